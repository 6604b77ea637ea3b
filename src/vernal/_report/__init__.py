"""Reports of fits: `report` has all of it, `rows` the parameters.

Nothing here knows a trainer.
"""

from .report import Report, criteria, p_value, p_value_note, pandas
from .rows import ParameterRow, Propagated, parameter_rows, plus_minus
