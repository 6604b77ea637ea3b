"""`load` and checkpoints warn where what a model does not train is another."""

import json
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn

DATA = jnp.arange(3.0)


class Law(eqx.Module):
    a: jax.Array
    mean: jax.Array
    order: int
    scale: float
    word: str
    key: jax.Array
    bias: Any
    kind: str | None = eqx.field(static=True)
    sizes: tuple[Any, ...] = eqx.field(static=True)
    form: Callable[..., Any] | str = eqx.field(static=True)


def law(**changes):
    given = {
        "mean": jnp.asarray([1.0, 2.0, 3.0]),
        "order": 3,
        "scale": 2.0,
        "word": "one",
        "key": jax.random.key(0),
        "bias": None,
        "kind": "tanh",
        "sizes": (1, None, ("a", 2.0)),
        "form": jnp.abs,
    }
    return Law(a=jnp.asarray(0.5), **given | changes)


class Fit(vn.Trainer):
    part: Law | None

    def __init__(self, model, rate=0.1, part=None, **options):
        super().__init__(model, optax.adam(rate), train="a", **options)
        self.part = part

    def loss(self, model, batch):
        return jnp.sum((model.a * model.mean - batch) ** 2)


OTHERS = {
    "mean": jnp.asarray([1.0, 2.0, 4.0]),
    "order": 4,
    "scale": 2.5,
    "word": "two",
    "key": jax.random.key(1),
    "bias": jnp.ones(2),
    "kind": None,
    "sizes": (1, None, ("b", 2.0)),
}
UNKNOWN = {"form": jnp.sin}


def said(act):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        act()
    assert all(one.filename == __file__ for one in found)
    return [str(one.message) for one in found]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "fit.vernal"


@pytest.mark.parametrize("name", OTHERS)
def test_it_is_told(name, file, tmp_path):
    fitted = Fit(law()).fit(DATA, 4, checkpoint=vn.Checkpoints(tmp_path / "fit"))
    vn.save(file, fitted.trainer)
    like = Fit(law(**{name: OTHERS[name]}))
    (text,) = said(lambda: vn.load(file, like))
    assert f"other values of {name!r} in the model than `like` has" in text
    checkpoint = vn.Checkpoints(tmp_path / "fit")
    (text,) = said(lambda: like.fit(DATA, 6, checkpoint=checkpoint))
    assert f"with another value of {name!r}, which is not trained" in text


def test_all_of_it_is_told_at_once(file):
    vn.save(file, Fit(law()))
    (text,) = said(lambda: vn.load(file, Fit(law(**OTHERS))))
    assert all(repr(name) in text for name in OTHERS)


ALIKE = {
    "the same": Fit(law()),
    "of NumPy": Fit(law(mean=np.asarray([1.0, 2.0, 3.0], jnp.zeros(1).dtype))),
    "a function": Fit(law(**UNKNOWN)),
    "a text for a function": Fit(law(form="abs")),
    "another rate": Fit(law(), 0.2),
    "bounds": Fit(law(), bounds={"a": (0.0, 9.0)}),
}


@pytest.mark.parametrize("name", ALIKE)
def test_nothing_else_is(name, file):
    vn.save(file, Fit(law()).fit(DATA, 2).trainer)
    assert said(lambda: vn.load(file, ALIKE[name])) == []


def many(means, steps=0):
    trainers = [Fit(law(mean=mean)) for mean in means]
    rows = jnp.arange(9.0).reshape(3, 3)
    return vn.fit_many(trainers, rows, steps, data_axis=0).trainers


SAME = [jnp.asarray([1.0, 2.0, 3.0])] * 3
EACH = [mean + i for i, mean in enumerate(SAME)]


@pytest.mark.parametrize("means", [SAME, EACH], ids=["same", "each"])
def test_many(means, file):
    """What members share may have a row for each, or one for all."""
    vn.save(file, many(means, 3))
    stacked = eqx.filter_vmap(lambda x: Fit(law(mean=x)))(jnp.stack(means))
    assert said(lambda: vn.load(file, many(means))) == []
    assert said(lambda: vn.load(file, stacked)) == []
    other = eqx.filter_vmap(lambda x: Fit(law(mean=x)))(jnp.stack(EACH) + 1)
    (text,) = said(lambda: vn.load(file, other))
    assert "'mean'" in text


def rewritten(file, change):
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    header = json.loads(parts["vernal.json"])
    change(header)
    parts["vernal.json"] = json.dumps(header).encode()
    with zipfile.ZipFile(file, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part)


def test_files_of_earlier_versions_do_not_say(file):
    vn.save(file, Fit(law()))
    rewritten(file, lambda header: header.pop("untrained"))
    assert said(lambda: vn.load(file, Fit(law(**OTHERS)))) == []


@pytest.mark.parametrize("content", [0, "", [], {"mean": 3}])
def test_a_header_may_hold_anything(content, file):
    vn.save(file, Fit(law()))
    rewritten(file, lambda header: header.update(untrained=content))
    with pytest.raises(vn.DamagedFileError):
        vn.load(file, Fit(law()))
    rewritten(file, lambda header: header.update(untrained={"mean": [content]}))
    assert len(said(lambda: vn.load(file, Fit(law())))) == 1


def test_too_many_leaves_are_not_compared(file):
    """The header of a file is bounded."""
    frozen = {f"{'long name ' * 20}{i}": jnp.asarray(i) for i in range(3000)}
    make = lambda order: Fit(law(bias=frozen, order=order))
    vn.save(file, make(1))
    assert said(lambda: vn.load(file, make(2))) == []


def test_a_static_field_within_a_field_of_the_trainer(tmp_path):
    checkpoint = vn.Checkpoints(tmp_path)
    Fit(law(), part=law()).fit(DATA, 4, checkpoint=checkpoint)
    other = Fit(law(), part=law(kind="sine"))
    (text,) = said(lambda: other.fit(DATA, 6, checkpoint=checkpoint))
    assert "with another field `part.kind` of the trainer" in text
