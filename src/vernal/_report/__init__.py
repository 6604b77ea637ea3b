"""Reports of fits: `report` has the numbers, `rows` the parameters, `written` the text.

`propagated` has the errors of functions.
Nothing here knows a trainer.
"""

from .propagated import Propagated
from .report import Report, criteria, p_value, pandas
from .rows import ParameterRow, parameter_rows, plus_minus
