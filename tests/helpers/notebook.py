"""Cells that are run one after another, and small fits in them."""

import textwrap

import numpy as np

X = np.arange(3.0)

START = """
import dataclasses, functools, types
from typing import Any, NamedTuple
import equinox as eqx, jax, jax.numpy as jnp, numpy as np, optax, vernal as vn

traces = []

class T(vn.Trainer):
    def residuals(self, model, batch):
        traces.append(1)
        return model(batch) - 6 * batch

def trainer(model=None, **options):
    model = M(jnp.ones(())) if model is None else model
    return T(model, optax.sgd(0.01), **options)
"""

MODEL = """
class M(eqx.Module):
    w: jax.Array
    def __call__(self, x):
        return {} * self.w * x
"""


class Notebook:
    """Runs cells one after another in one namespace, as a notebook does."""

    def __init__(self, *cells):
        self.names = {"__name__": "__main__"}
        self.run(START)
        for cell in cells:
            self.run(cell)

    def run(self, cell):
        exec(textwrap.dedent(cell), self.names)

    def __getitem__(self, name):
        return self.names[name]


def fisher(trainer):
    """Is 5 for the factor 1, and 20 for 2."""
    return float(trainer.fisher(X)[0, 0])
