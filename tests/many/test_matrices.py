"""Members whose losses decompose matrices, which JAX cannot always map together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
from jax.scipy.linalg import solve_triangular

import inside
import vernal as vn
from lapack import stacks

SIZE, TIMES = 3, np.linspace(0.0, 3.0, 8)
STARTS = [{"size": np.float64(s), "length": np.float64(1.0)} for s in (0.5, 1.0, 2.0)]
DISTANCES = abs(TIMES[:, None] - TIMES)
FACTOR = np.linalg.cholesky(np.exp(-DISTANCES) + 0.1 * np.eye(8))
DATA = np.random.default_rng(0).normal(size=(SIZE, 8)) @ FACTOR.T


def by_cholesky(matrix, y):
    factor = jnp.linalg.cholesky(matrix)
    z = solve_triangular(factor, y, lower=True)
    return 0.5 * z @ z + jnp.sum(jnp.log(jnp.diag(factor)))


def by_solving(matrix, y):
    return 0.5 * (y @ jnp.linalg.solve(matrix, y) + jnp.linalg.slogdet(matrix)[1])


def by_eigenvalues(matrix, y):
    values, vectors = jnp.linalg.eigh(matrix)
    return 0.5 * jnp.sum((vectors.T @ y) ** 2 / values + jnp.log(values))


class Process(vn.Trainer):
    """A Gaussian process."""

    likelihood = staticmethod(by_cholesky)

    def nll(self, model, batch):
        kernel = model["size"] ** 2 * jnp.exp(-DISTANCES / model["length"])
        matrix = kernel + 0.1 * np.eye(8)
        return self.likelihood(matrix, batch)


class Solved(Process):
    likelihood = staticmethod(by_solving)


class Decomposed(Process):
    likelihood = staticmethod(by_eigenvalues)


@pytest.fixture
def watched(monkeypatch):
    """Looks at the programs of many before they run: one that waits does not end."""
    monkeypatch.setattr(inside.mapped_lapack, "_WAITS", True)
    seen = []

    def watch(owner, name):
        run = getattr(owner, name)

        def watched(*args):
            program = run.lower(*args).compile().as_text()
            assert "lapack_" in program
            assert stacks(program) == []
            seen.append(name)
            return run(*args)

        monkeypatch.setattr(owner, name, watched)

    watch(inside.many_trainers, "run_many")
    watch(inside.rounds_of_many, "_run")
    watch(inside.errors_of_many, "run_errors")
    return seen


@pytest.mark.parametrize("kind", [Process, Solved, Decomposed])
def test_members_take_their_steps_one_after_the_other(kind, watched):
    trainers = [kind(jax.tree.map(jnp.asarray, x), optax.adam(0.1)) for x in STARTS]
    many = vn.fit_many(trainers, DATA, 20, data_axis=0, progress=False)
    assert set(watched) == {"run_many"}
    for index, trainer in enumerate(trainers):
        alone = trainer.fit(DATA[index], 20, progress=False)
        own = many.history.loss[:, index]
        np.testing.assert_allclose(own, alone.history.loss, rtol=1e-10)


def test_solves_and_errors_of_many_do_not_wait(watched):
    trainers = [Process(jax.tree.map(jnp.asarray, start)) for start in STARTS]
    solver = optx.BFGS(rtol=1e-8, atol=1e-8)
    many = vn.fit_many(trainers, DATA, 100, data_axis=0, solver=solver, progress=False)
    errors = many.errors(DATA)
    assert set(watched) == {"_run", "run_errors"}
    for index in range(SIZE):
        own = many.trainer(index).standard_errors(DATA[index])
        row = [column[index] for column in errors.values()]
        np.testing.assert_allclose(row, [*own.values()], rtol=1e-6)


MATRIX = np.eye(3)
CALLS = {
    "cholesky": jnp.linalg.cholesky,
    "inverse": jnp.linalg.inv,
    "singular values": jnp.linalg.svd,
    "QR": jnp.linalg.qr,
    "in a loop": lambda x: jax.lax.fori_loop(0, 2, lambda _, y: jnp.linalg.inv(y), x),
    "in a branch": lambda x: jax.lax.cond(x[0, 0] > 0, jnp.linalg.inv, jnp.tanh, x),
    "compiled by itself": jax.jit(jnp.linalg.inv),
}
OTHERS = {
    "a product": lambda x: x @ x,
    "a transform": lambda x: jnp.fft.fft(x).real,
    "an error": lambda x: x @ jnp.ones(5),
}


@pytest.mark.parametrize("name", CALLS | OTHERS)
def test_calls_of_lapack_are_seen_wherever_they_are(name, monkeypatch):
    monkeypatch.setattr(inside.mapped_lapack, "_WAITS", True)
    assert inside.mapped_lapack.may_hang((CALLS | OTHERS)[name], MATRIX) is (
        name in CALLS
    )


def test_nothing_is_traced_where_jax_does_not_wait(monkeypatch):
    monkeypatch.setattr(inside.mapped_lapack, "_WAITS", False)
    assert not inside.mapped_lapack.may_hang(functools.partial(pytest.fail, "traced"))
