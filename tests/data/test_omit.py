"""`omit` leaves out data that are not finite, and says how many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vernal as vn

Y = np.ones((5, 2))
Y[2, 1] = np.nan
ERROR = np.array([1.0, np.inf, 1.0, 1.0, 1.0])
BATCH = {"x": np.arange(5), "y": Y, "error": jnp.asarray(ERROR), "unit": 2.0, "n": 3}


def test_each_datum_with_a_bad_number_is_left_out():
    data, omitted = vn.omit(BATCH)
    kept = [0, 3, 4]
    assert np.flatnonzero(omitted.kept).tolist() == kept
    np.testing.assert_array_equal(data["x"], kept)
    np.testing.assert_array_equal(data["y"], Y[kept])
    np.testing.assert_array_equal(data["error"], np.ones(3))
    assert data["unit"] == 2.0
    assert data["n"] == 3
    assert omitted.count == 2
    assert omitted.by_leaf == {"`batch['y']`": 1, "`batch['error']`": 1}
    assert str(omitted).startswith("Left out 2 of 5 data, the first at [1]. Not finite")


BESIDE = {
    "a float": 2.0,
    "an integer": 3,
    "a boolean": False,
    "text": np.str_("a"),
    "a number of NumPy": np.float32(2.0),
    "an array without an axis": jnp.asarray(2.0),
    "nothing": None,
}


@pytest.mark.parametrize("values", [[1.0, np.nan], [1.0, 2.0]])
def test_what_belongs_to_no_datum_stays_as_it_is(values):
    data, _ = vn.omit({"x": np.array(values), **BESIDE})
    for name, leaf in BESIDE.items():
        assert data[name] is leaf, name


def test_nothing_is_left_out_of_finite_data():
    data, omitted = vn.omit((np.arange(5), Y[:2].repeat(3, 0)[:5]))
    assert omitted.count == 0
    assert str(omitted) == "Left out none of 5 data."
    np.testing.assert_array_equal(data[0], np.arange(5))


def test_a_fit_of_what_is_left_is_that_of_masked_data():
    class Mean(vn.Trainer):
        def residuals(self, model, batch):
            there = jnp.isfinite(batch)
            mean = jnp.broadcast_to(model, batch.shape)
            return vn.likelihoods.Gaussian(mean, batch, where=there)

    values = np.array([1.0, np.nan, 3.0, np.inf, 8.0])
    reports = [Mean(jnp.array(4.0)).report(b) for b in (values, vn.omit(values)[0])]
    assert reports[0].to_dict() == reports[1].to_dict()
    assert reports[0].data_count == 3


COV = np.cov(np.random.default_rng(0).normal(size=(5, 9)))
BAD = COV.copy()
BAD[3], BAD[:, 3] = np.nan, np.inf
MATRICES = {
    "a covariance": (COV, [0, 1, 3, 4]),
    "in small units": (1e-20 * COV, [0, 1, 3, 4]),
    "rounded": (COV + 1e-9 * np.triu(np.ones((5, 5))), [0, 1, 3, 4]),
    "of complex data": (COV + 0.1j * (np.triu(COV) - np.tril(COV)), [0, 1, 3, 4]),
    "of an unknown datum": (np.where(np.isnan(BAD), BAD, BAD.T), [0, 1, 4]),
}


@pytest.mark.parametrize("name", MATRICES)
def test_a_matrix_of_pairs_of_data_loses_rows_and_columns(name):
    matrix, kept = MATRICES[name]
    y = np.where(np.arange(5) == 2, np.nan, 1.0)
    (y, found), omitted = vn.omit((y, matrix))
    assert np.flatnonzero(omitted.kept).tolist() == kept
    assert len(y) == len(kept)
    np.testing.assert_allclose(found, matrix[np.ix_(kept, kept)], rtol=1e-6)


@pytest.mark.parametrize("value", [0.1, 0.0, -1.0, 3, True])
def test_a_constant_image_keeps_its_columns(value):
    image, sigma = np.arange(9.0).reshape(3, 3), np.full((3, 3), value)
    image[1, 2] = np.nan
    (_, left), _ = vn.omit((image, sigma))
    assert left.shape == (2, 3)


def test_other_square_matrices_keep_their_columns():
    table = np.random.default_rng(0).normal(size=(5, 5))
    table[2, 4] = np.inf
    keys = jax.random.split(jax.random.key(0), (5, 5))
    (found, left), _ = vn.omit((table, keys))
    np.testing.assert_allclose(found, np.delete(table, 2, 0), rtol=1e-6)
    assert left.shape == (4, 5)


SOURCE = vn.Minibatches(np.ones(3), 2, key=jax.random.key(0))
FAULTS = {
    "lengths": ((np.ones(3), np.ones(4)), ValueError, "It is 3 in `batch.0.`, 4 in"),
    "no array": (("a", 1), ValueError, "`batch` has no array with an axis"),
    "of no datum": ((np.ones(3), np.nan), ValueError, "`batch.1.` is nan, and belo"),
    "all": (
        np.full(3, np.nan),
        ValueError,
        "`batch` has no finite datum. Left out 3 of 3",
    ),
    "source": (
        vn.Minibatches(np.ones(3), 2, key=jax.random.key(0)),
        TypeError,
        "must be one batch",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault):
    batch, kind, words = FAULTS[fault]
    with pytest.raises(kind, match=words):
        vn.omit(batch)
