"""One step, pure, and what it fits."""

from .constrain import check_elementwise as check_elementwise
from .construct import (
    check_arguments as check_arguments,
    check_class as check_class,
    check_ruled as check_ruled,
    find_trained as find_trained,
    fit_projector as fit_projector,
    initial_opt_state as initial_opt_state,
    no_optimiser as no_optimiser,
    refuse_names_in_latent_space as refuse_names_in_latent_space,
)
from .diagnosis import (
    Diagnosis as Diagnosis,
    bad_data as bad_data,
    diagnosed as diagnosed,
    explain_non_finite as explain_non_finite,
)
from .hyperparams import (
    beginning as beginning,
    carried_over as carried_over,
    settled as settled,
)
from .model import check_state as check_state, checked_model as checked_model
from .model_template import Parts as Parts
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
from .step import (
    MOST_STEPS as MOST_STEPS,
    Best as Best,
    Outcome as Outcome,
    Progress as Progress,
    advance as advance,
    count_non_finite as count_non_finite,
    held_best as held_best,
    initial_progress as initial_progress,
    ranked as ranked,
    scored_anew as scored_anew,
    tree_norm as tree_norm,
)
