"""Immutable optimisers for physical models, in JAX and Equinox."""

from ._checkpoint import Checkpoints as Checkpoints
from ._compiled import StepInfo as StepInfo
from ._curvature import (
    gauss_newton as gauss_newton,
    gauss_newton_matvec as gauss_newton_matvec,
    hessian as hessian,
    hessian_matvec as hessian_matvec,
    jacobian as jacobian,
)
from ._data import (
    Minibatches as Minibatches,
    Stream as Stream,
    StreamExhaustedError as StreamExhaustedError,
)
from ._eigen import decompose as decompose, eigen_projection as eigen_projection
from ._file import (
    DamagedFileError as DamagedFileError,
    ForeignFileError as ForeignFileError,
    NewerFormatError as NewerFormatError,
)
from ._function import fit as fit
from ._history import History as History
from ._leaves import LoadError as LoadError, MismatchError as MismatchError
from ._many import fit_many as fit_many
from ._map_optimisers import map_optimisers as map_optimisers
from ._members import ManyResult as ManyResult
from ._nonfinite import (
    BreakOnNan as BreakOnNan,
    NanCount as NanCount,
    NanPolicy as NanPolicy,
    NonFiniteError as NonFiniteError,
    RaiseOnNan as RaiseOnNan,
    SkipStep as SkipStep,
    StopAfter as StopAfter,
    StopFit as StopFit,
    Verdict as Verdict,
    ZeroNans as ZeroNans,
    debug_nan_check as debug_nan_check,
    zero_nan_check as zero_nan_check,
)
from ._optimiser import ParamOptimiser as ParamOptimiser
from ._partition import partition as partition
from ._paths import UnknownPathError as UnknownPathError, paths as paths
from ._peers import PeerError as PeerError
from ._precondition import precondition as precondition
from ._programs import forget as forget
from ._projector import EigenProjector as EigenProjector
from ._result import FitResult as FitResult
from ._retrace import explain_retrace as explain_retrace
from ._save import load as load, save as save
from ._schedule import delay as delay
from ._selectors import split as split
from ._stop import (
    Converged as Converged,
    Patience as Patience,
    StepView as StepView,
    StopCriterion as StopCriterion,
    StopReason as StopReason,
)
from ._trainer import Trainer as Trainer
from ._transform import window as window
from ._unroll import unroll as unroll
from ._warn import (
    ObjectiveWarning as ObjectiveWarning,
    PrecisionWarning as PrecisionWarning,
)
