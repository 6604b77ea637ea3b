"""Tables and reports of an `nll` that curves downwards: values, and why no errors."""

import math

import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import vernal as vn

DOWN = "no errors, as it is not at a minimum: the loss curves downwards along"


class Saddle(vn.Trainer):
    def nll(self, model, batch):
        a, b = model["a"], model["b"]
        bowl = (a + b) ** 2 + (model["c"] - 3) ** 2
        return batch * bowl - 1e-3 * (a - b) ** 2 + (a - b) ** 4


class Both(Saddle):
    def loss(self, model, batch):
        return self.nll(model, batch) / batch


class Squares(vn.Trainer):
    def residuals(self, model, batch):
        return batch * jnp.stack([model["a"] ** 2 - 1, model["b"]])


class Kink(vn.Trainer):
    def nll(self, model, batch):
        beside = abs(model["a"] - 1) * (1 + model["b"])
        return batch * beside + model["b"] ** 2


def of(kind, **options):
    bare = {"a": 1e-3, "b": 1e-3} | ({} if kind in (Squares, Kink) else {"c": 1.0})
    return kind({name: jnp.array(x) for name, x in bare.items()}, **options)


BOUNDS = {"bounds": {"c": (0, 1)}}
CASES = {
    "alone": (of(Saddle), DOWN, 3),
    "at a bound": (of(Saddle, **BOUNDS), DOWN, 2),
    "with a prior": (of(Saddle, priors={"a": vn.Normal(0, 100)}), DOWN, 3),
    "beside a loss": (of(Both), "no errors: The Hessian of `nll` at this point", 3),
    "linear": (of(Kink), "no errors", 2),
}


@pytest.mark.parametrize("name", CASES)
def test_there_are_values(name):
    trainer, note, free = CASES[name]
    report, table = trainer.report(1.0, data_count=9), trainer.table(1.0)
    assert report.note is not None
    assert report.note.startswith(note)
    assert table.endswith(report.note)
    assert "a          0.001" in table
    assert ("at its bound (1)" in table) == (name == "at a bound")
    assert report["a"].value == pytest.approx(1e-3)
    assert math.isnan(report["a"].error)
    assert report.data_count == 9
    assert (report.free_count, report.aic, report.bic) == (free, None, None)
    assert sum(row.is_free for row in report.parameters) == free
    assert np.isnan(report.correlation_matrix).all()
    assert report.correlation_matrix.shape == (free, free)
    assert (report.prior_penalty is None) == (name != "with a prior")
    assert report.to_dict()["parameters"]["a"]["status"] == ""
    assert report.note in str(report)


def test_others_are_refused():
    trainer = of(Saddle)
    for method in (
        trainer.standard_errors,
        trainer.whiten,
        lambda batch: trainer.propagate(lambda model: model["a"], batch),
        lambda batch: trainer.table(batch, scale_errors=True),
        lambda batch: of(Squares).table(batch, kind="observed"),
    ):
        with pytest.raises(
            ValueError, match=r"indefinite.*max_steps|no.* scatter|give "
        ):
            method(1.0)


def test_a_solve_that_ran_out_of_steps_has_a_table():
    result = of(Saddle).solve(optx.BFGS(1e-8, 1e-8), 1.0, max_steps=1)
    assert result.stop_reason is vn.StopReason.MAX_STEPS
    assert "`max_steps=`" in result.table(1.0)
    assert str(result.stop_reason) in str(result.report(1.0))


def test_one_of_many_has_a_report():
    many = vn.fit_many([of(Saddle), of(Saddle)], 1.0, 1, solver=optx.BFGS(1e-8, 1e-8))
    assert DOWN in str(many.report(1, 1.0))
