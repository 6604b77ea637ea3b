"""Immutable optimisers for physical models, in JAX and Equinox."""

from importlib.metadata import version as _version

from . import likelihoods as likelihoods
from ._boundary import (
    ObjectiveWarning as ObjectiveWarning,
    PrecisionWarning as PrecisionWarning,
)
from ._constraints import Bijection as Bijection, Normal as Normal
from ._curvature import (
    decompose as decompose,
    eigen_projection as eigen_projection,
    gauss_newton as gauss_newton,
    gauss_newton_matvec as gauss_newton_matvec,
    hessian as hessian,
    hessian_matvec as hessian_matvec,
    jacobian as jacobian,
)
from ._data import (
    Minibatches as Minibatches,
    Omitted as Omitted,
    Stream as Stream,
    StreamExhaustedError as StreamExhaustedError,
    omit as omit,
)
from ._devices import PeerError as PeerError
from ._fit import FitResult as FitResult
from ._loop import StepInfo as StepInfo, unroll as unroll
from ._many import ManyResult as ManyResult, fit_many as fit_many
from ._optimiser import (
    ParamOptimiser as ParamOptimiser,
    delay as delay,
    map_optimisers as map_optimisers,
    partition as partition,
    precondition as precondition,
    window as window,
)
from ._policy import (
    BreakOnNan as BreakOnNan,
    Converged as Converged,
    NanCount as NanCount,
    NanPolicy as NanPolicy,
    NonFiniteError as NonFiniteError,
    Patience as Patience,
    RaiseOnNan as RaiseOnNan,
    SkipStep as SkipStep,
    StepView as StepView,
    StopAfter as StopAfter,
    StopCriterion as StopCriterion,
    StopFit as StopFit,
    StopReason as StopReason,
    Verdict as Verdict,
    ZeroNans as ZeroNans,
    debug_nan_check as debug_nan_check,
    zero_nan_check as zero_nan_check,
)
from ._profile import Profile as Profile
from ._program import forget as forget
from ._projection import EigenProjector as EigenProjector
from ._report import Propagated as Propagated, Report as Report
from ._storage import (
    Checkpoints as Checkpoints,
    DamagedFileError as DamagedFileError,
    ForeignFileError as ForeignFileError,
    History as History,
    NewerFormatError as NewerFormatError,
    load as load,
    save as save,
)
from ._trainer import (
    Trainer as Trainer,
    explain_retrace as explain_retrace,
    fit as fit,
)
from ._tree import (
    LoadError as LoadError,
    MismatchError as MismatchError,
    UnknownPathError as UnknownPathError,
    paths as paths,
    split as split,
)

# For `help` and the like. Type checkers read the imports.
globals()["__all__"] = [name for name in globals() if name[0] != "_"]

__version__ = _version("vernal")
