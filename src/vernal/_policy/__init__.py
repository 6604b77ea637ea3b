"""What users compose: policies for non-finite values, and stop criteria."""

from .nan_policy import (
    SKIP_ADVICE as SKIP_ADVICE,
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
    all_finite as all_finite,
    debug_nan_check as debug_nan_check,
    is_finite as is_finite,
    zero_nan_check as zero_nan_check,
)
from .stop_criterion import (
    AT_NON_FINITE as AT_NON_FINITE,
    Converged as Converged,
    Patience as Patience,
    StepView as StepView,
    StopCriterion as StopCriterion,
    StopReason as StopReason,
)
