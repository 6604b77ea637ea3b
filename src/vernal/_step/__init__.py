"""One step, pure, and what it fits."""

from .abstract_trainer import (
    AbstractTrainer,
    Batch,
    Model,
    TrainerT,
    bijections_of,
    bounds_of,
    changed,
    config_of,
    from_free_coordinates,
    in_free_coordinates,
    in_real_coordinates,
    is_constrained,
    is_made,
    member_axes,
    note_made,
    overrides,
    own_fields,
    precision_of,
    prepared_config,
    priors_of,
    progress_of,
    stripped,
    template_of,
    tied_words,
    with_bounds,
    with_progress,
)
from .constrain import check_elementwise, warn_of_line_search
from .construct import (
    check_arguments,
    check_class,
    check_own_fields,
    check_ruled,
    checked_model,
    constraints,
    find_trained,
    fit_projector,
    initial_opt_state,
    initial_progress,
    refuse_own_projector,
    require_optimiser,
)
from .diagnosis import Diagnosis, bad_data, diagnosed, warn_of_no_data
from .edges import prior_ends, pushed
from .model_template import ModelTemplate
from .nan_report import (
    last_bad_step,
    nan_columns,
    nan_report,
    non_finite_error,
    raised_if_bad,
)
from .objective import (
    DataKind,
    count_of,
    defined,
    evaluate,
    live,
    loss_at,
    metric_shapes,
    negative_log_likelihood,
    prior_count,
    prior_rows,
    real_residuals,
    real_residuals_and_kind,
    require_all_data,
    residual_terms,
    residuals_by_place,
    score,
    scoring_residuals,
    step_key,
)
from .opt_state import beginning, settled
from .progress import (
    Best,
    Progress,
    count_non_finite,
    held_best,
    ranked,
    with_some_best,
    without_best,
)
from .replace import replaced_fields, reproject
from .scored_by import (
    BATCH_BY_BATCH,
    Scorer,
    begun_on,
    code_of,
    compared,
    data_code_of,
    data_mark,
    digests,
    in_source,
    is_of_other_code,
    is_scored_otherwise,
    marks_of_rows,
    noted,
    noted_as,
    noted_as_member,
    scored_parts,
    scorer_of,
    stepped_on,
)
from .step import Outcome, advance, advance_bare, has_turned_bad, live_if, tree_norm
from .suspect_data import warn_of_sums, warn_of_suspect_data
from .suspect_model import warn_of_constants, warn_of_training_layers
from .usable import (
    refuse_stacked,
    refuse_strays,
    require_one,
    require_parts,
    require_precision,
    require_sound,
    strays_of,
)
