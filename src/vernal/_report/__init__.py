"""Reports of fits: `report` has the numbers, `rows` the parameters, `written` the text.

Nothing here knows a trainer.
"""

from .report import Report, criteria, p_value, pandas
from .rows import ParameterRow, Propagated, parameter_rows, plus_minus
