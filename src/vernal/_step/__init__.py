"""One step, pure, and what it fits."""

from .abstract_trainer import (
    AbstractTrainer as AbstractTrainer,
    Batch as Batch,
    Model as Model,
    TrainerT as TrainerT,
    changed as changed,
    config_of as config_of,
    overrides as overrides,
    progress_of as progress_of,
    stripped as stripped,
    template_of as template_of,
    with_progress as with_progress,
)
from .constrain import check_elementwise as check_elementwise
from .construct import (
    check_arguments as check_arguments,
    check_class as check_class,
    check_ruled as check_ruled,
    find_trained as find_trained,
    fit_projector as fit_projector,
    initial_opt_state as initial_opt_state,
    no_optimiser as no_optimiser,
)
from .diagnosis import (
    Diagnosis as Diagnosis,
    bad_data as bad_data,
    diagnosed as diagnosed,
    explain_non_finite as explain_non_finite,
)
from .hyperparams import beginning as beginning, settled as settled
from .model import checked_model as checked_model
from .model_template import ModelTemplate as ModelTemplate
from .nan_report import (
    is_at_bad_step as is_at_bad_step,
    last_bad_step as last_bad_step,
    nan_report as nan_report,
    non_finite_error as non_finite_error,
    raise_if_non_finite as raise_if_non_finite,
)
from .objective import (
    defined as defined,
    evaluate as evaluate,
    live as live,
    metric_shapes as metric_shapes,
    negative_log_likelihood as negative_log_likelihood,
    real_residuals as real_residuals,
    score as score,
    step_key as step_key,
)
from .precision import (
    precision_of as precision_of,
    require_precision as require_precision,
)
from .progress import (
    MOST_STEPS as MOST_STEPS,
    Best as Best,
    Progress as Progress,
    count_non_finite as count_non_finite,
    held_best as held_best,
    initial_progress as initial_progress,
    ranked as ranked,
    with_comparable_best as with_comparable_best,
)
from .replace import replaced_fields as replaced_fields, reproject as reproject
from .step import Outcome as Outcome, advance as advance, tree_norm as tree_norm
