"""A warning of layers that score a validation as they are in training."""

import weakref
from typing import Any

import equinox as eqx

from .._boundary import spelled_leaves, warn_once
from .abstract_trainer import AbstractTrainer


def warn_of_training_layers(trainer: AbstractTrainer) -> None:
    """Warns, once for a class, of dropout and the like in the score of a validation.

    A class that defines `evaluate` knows what it does.
    """
    kind = type(trainer)
    if kind.evaluate.__module__.split(".")[0] != __name__.split(".")[0]:
        return
    for where, layer in spelled_leaves("model", trainer.model, _is_in_training):
        if _is_in_training(layer):
            warn_once(
                f"`validation`: the {type(layer).__name__} {where} is as in training "
                "(`inference=False`), since the score is the loss: it is not that of "
                "the model as you will use it, and `best` and `Patience` follow it. "
                "Define `evaluate(self, model, batch)` in your trainer, with "
                "`eqx.nn.inference_mode(model)`.",
                UserWarning,
                of=(warn_of_training_layers, weakref.ref(kind)),
            )
            return


def _is_in_training(node: Any) -> bool:
    if not isinstance(node, eqx.Module):
        return False
    # Dropout of nothing, as attention has it by default, does nothing. A model may have
    # a parameter `p`.
    share = getattr(node, "p", None)
    is_nothing = isinstance(share, int | float) and share == 0
    return getattr(node, "inference", None) is False and not is_nothing
