"""A state that looks like another optimiser's is not taken for it.

The oracle is a new trainer: its moments are those of its own optimiser.
"""

import contextlib
import itertools
import json
import zipfile

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest

import vernal as vn
from models import same

RATE = 1e-2
START = {"w": jnp.asarray([3.0, -1.0]), "b": jnp.asarray(0.5)}


class Bowl(vn.Trainer):
    def loss(self, model, batch):
        return 1e4 * sum(jnp.sum((leaf - batch) ** 2) for leaf in model.values())


# All that Optax has with one kind of state, by what the state means.
MEANINGS = {
    "ScaleByAdamState": {
        "averages of squares": {
            "scale_by_adam": optax.scale_by_adam,
            "scale_by_radam": optax.scale_by_radam,
            "scale_by_yogi": optax.scale_by_yogi,
        },
        "largest values": {"scale_by_adamax": optax.scale_by_adamax},
        "averages of scaled gradients": {
            "scale_by_adopt": optax.contrib.scale_by_adopt
        },
    },
    "ScaleByBeliefState": {
        "averages of squared distances": {
            "scale_by_belief": optax.scale_by_belief,
            "scale_by_acprop": optax.contrib.scale_by_acprop,
        }
    },
}


def is_alike(pair):
    """Whether the state of the first is kept for the second."""
    (_, a, _), (_, b, _) = pair
    return a == b


def in_a_ring(kind):
    """Pairs in which each is once the first and once the second."""
    made = [
        (name, meaning, make)
        for meaning in kind
        for name, make in kind[meaning].items()
    ]
    return zip(made, [*made[1:], made[0]], strict=True)


PAIRS = [pair for kind in MEANINGS.values() for pair in in_a_ring(kind)]


def own(decay):
    """A transformation of a user, with Optax's state, and a meaning of its own."""

    def update(updates, state, params=None):
        largest = lambda old, new: jnp.maximum(decay * old, jnp.abs(new))
        trace = jax.tree.map(largest, state.trace, updates)
        return updates, optax.TraceState(trace)

    return optax.GradientTransformation(optax.trace(decay).init, update)


def stateless():
    """A transformation of a user, whose first state has nothing in it."""
    return optax.GradientTransformation(
        lambda params: optax.EmptyState(),
        lambda updates, state, params=None: (updates, state),
    )


def in_rules(make):
    return lambda rate: vn.ParamOptimiser({"w": make(rate), "b": None})


NESTS = {
    "plain": lambda make: make,
    "rule": in_rules,
    "tuple rule": lambda make: lambda rate: vn.ParamOptimiser({("b", "w"): make(rate)}),
    "default": lambda make: lambda rate: vn.ParamOptimiser({}, default=make(rate)),
    "first": lambda make: (
        lambda rate: vn.ParamOptimiser({}, first=make(rate), default=optax.identity())
    ),
    "chain": lambda make: lambda rate: optax.chain(optax.clip(1e9), make(rate)),
    "named chain": lambda make: (
        lambda rate: optax.named_chain(("clip", optax.clip(1e9)), ("x", make(rate)))
    ),
    "rules in a chain": lambda make: (
        lambda rate: optax.chain(in_rules(make)(rate), optax.clip(1e9))
    ),
    "injected": lambda make: optax.inject_hyperparams(make),
    "masked": lambda make: (
        lambda rate: optax.masked(
            make(rate), lambda tree: jax.tree.map(lambda _: True, tree)
        )
    ),
    "window": lambda make: lambda rate: vn.window(make(rate)),
    "finite": lambda make: lambda rate: optax.apply_if_finite(make(rate), 3),
    "every second": lambda make: (
        lambda rate: optax.MultiSteps(make(rate), 2).gradient_transformation()
    ),
    "partition": lambda make: (
        lambda rate: vn.partition(
            {"x": make(rate)}, lambda tree: jax.tree.map(lambda _: "x", tree)
        )
    ),
    "optax.partition": lambda make: (
        lambda rate: optax.partition(
            {"x": make(rate)}, lambda tree: jax.tree.map(lambda _: "x", tree)
        )
    ),
}

KEPT = {
    "rate": (optax.adam(0.1), optax.adam(0.2)),
    "schedule": (
        optax.adam(optax.linear_schedule(0.1, 0.0, 9)),
        optax.adam(optax.cosine_decay_schedule(0.1, 9)),
    ),
    "decay": (optax.adamw(0.1, weight_decay=0.1), optax.adamw(0.1, weight_decay=0.2)),
    "b1": (optax.adam(0.1, b1=0.9), optax.adam(0.1, b1=0.5)),
    "Nesterov": (optax.adam(0.1), optax.nadam(0.1)),
    "momentum": (optax.sgd(0.1, 0.9), optax.sgd(0.1, 0.5, nesterov=True)),
    "what has no state": (
        optax.chain(optax.clip(1.0), optax.adam(0.1)),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
    ),
    "what has no state, by hand": (
        optax.chain(stateless(), optax.adam(0.1)),
        optax.chain(optax.identity(), optax.adam(0.1)),
    ),
    "wrapper": (
        vn.partition({"x": optax.adam(0.1)}, dict.fromkeys(START, "x")),
        vn.partition({"x": optax.adam(0.2)}, lambda tree: dict.fromkeys(tree, "x")),
    ),
    "selector": (
        vn.ParamOptimiser({("w", "b"): optax.adam(0.1)}),
        vn.ParamOptimiser({"*": optax.adam(0.1)}),
    ),
}


def moved(optimiser, folder=None, steps=3):
    checkpoint = folder and vn.Checkpoints(folder)
    return Bowl(START, optimiser).fit(1.0, steps, checkpoint=checkpoint).trainer


def by_hand(optimiser):
    """A trainer in the midst of a fit, as far as a file shows."""
    add = lambda leaf: leaf + 1 if eqx.is_inexact_array(leaf) else leaf
    trainer = Bowl(START, optimiser)
    moves = lambda trainer: trainer._progress
    return eqx.tree_at(moves, trainer, jax.tree.map(add, moves(trainer)))


def require_refused(old, new, names, folder):
    """It begins afresh in the program, and is refused from a file."""
    trainer = by_hand(old)
    assert not same(trainer.opt_state, Bowl(START, old).opt_state)
    assert same(trainer.replace(optimiser=new).opt_state, Bowl(START, new).opt_state)
    vn.save(folder / "file", trainer)
    said = "of `{}`, not of `{}`".format(*names)
    with pytest.raises(vn.MismatchError, match=said):
        vn.load(folder / "file", Bowl(START, new))
    loaded = vn.load(folder / "file", Bowl(START, new), reset="opt_state")
    assert same(loaded.params, trainer.params)


def require_kept(old, new, folder):
    trainer = by_hand(old)
    assert same(trainer.replace(optimiser=new).opt_state, trainer.opt_state)
    vn.save(folder / "file", trainer)
    loaded = vn.load(folder / "file", Bowl(START, new))
    assert same(loaded.opt_state, trainer.opt_state)


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0][0]}-{pair[1][0]}")
def test_pairs(pair, tmp_path):
    (old, _, a), (new, _, b) = pair
    a, b = (optax.chain(make(), optax.scale(-RATE)) for make in (a, b))
    if is_alike(pair):
        require_kept(a, b, tmp_path)
    else:
        require_refused(a, b, (old, new), tmp_path)


def test_all_pairs_are_known():
    """All of Optax that can be made without an argument and has a state."""
    found = {}
    for package in (optax, optax.contrib):
        for name in dir(package):
            if name.startswith("scale_by_"):
                with contextlib.suppress(TypeError):
                    state = getattr(package, name)().init(START)
                    if jax.tree.leaves(state):
                        found.setdefault(jax.tree.structure(state), []).append(name)
    several = [names for names in found.values() if len(names) > 1]
    known = [list(itertools.chain(*kind.values())) for kind in MEANINGS.values()]
    assert sorted(map(sorted, several)) == sorted(map(sorted, known))


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("name", NESTS)
def test_nests(name, tmp_path):
    old, new = (NESTS[name](make)(RATE) for make in (optax.adam, optax.adamax))
    names = "scale_by_adam", "scale_by_adamax"
    require_refused(old, new, names, tmp_path)


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("nest", ["plain", "rule"])
def test_the_same_of_a_checkpoint(nest, tmp_path):
    of = NESTS[nest]
    trainer = moved(of(optax.adam)(RATE), tmp_path)
    with pytest.raises(vn.MismatchError, match="of `scale_by_adam`, not of"):
        moved(of(optax.adamax)(RATE), tmp_path, 6)
    resumed = moved(of(optax.adam)(2 * RATE), tmp_path)
    assert same(resumed.opt_state, trainer.opt_state)


def test_the_rule_is_named(tmp_path):
    old, new = (in_rules(make)(RATE) for make in (optax.adam, optax.adamax))
    vn.save(tmp_path / "file", moved(old))
    with pytest.raises(vn.MismatchError, match="of the rule 'w': of `scale_by_adam`"):
        vn.load(tmp_path / "file", Bowl(START, new))


def of_itself(rate):
    """Its `update` has the whole of it in a cell, and an empty one."""
    adam = optax.adam(rate)

    def update(updates, state, params=None):
        if tx is None:
            return later
        return adam.update(updates, state, params)

    tx = optax.GradientTransformation(adam.init, update)
    if rate < 0:
        later = None
    return tx


# What a user has written may be renamed or wrapped: nothing is known of its state.
USERS = {
    "of another name": (optax.trace(0.5), own(0.5)),
    "its own": (own(0.5), own(0.6)),
    "around one of Optax": (optax.adam(0.1), of_itself(0.1)),
    "around another": (of_itself(0.1), optax.adamax(0.1)),
}


@pytest.mark.parametrize("name", USERS)
def test_a_transformation_of_a_user(name, tmp_path):
    require_kept(*USERS[name], tmp_path)


def test_a_rule_without_leaves_is_no_other(tmp_path):
    """Its state is empty."""
    old = vn.ParamOptimiser({"w": optax.adam(0.1), "b": optax.adam(0.1)})
    rules = {"w": optax.adam(0.1), "b": optax.adam(0.1), "**": optax.sgd(0.1, 0.9)}
    vn.save(tmp_path / "file", moved(old))
    vn.load(tmp_path / "file", Bowl(START, vn.ParamOptimiser(rules)))


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept(name, tmp_path):
    require_kept(*KEPT[name], tmp_path)


def test_many_members():
    """Each member keeps its state, or none does."""
    each = eqx.filter_vmap(lambda start: Bowl(start, optax.adam(RATE)))
    members = each({"w": jnp.ones((2, 3)), "b": jnp.ones(2)})
    many = vn.fit_many(members, 1.0, 3).trainers
    kept = many.replace(optimiser=optax.adam(0.5))
    assert same(kept.opt_state, many.opt_state)
    assert not many.replace(optimiser=optax.adamax(RATE)).opt_state[0].count.any()


def without_makers(file):
    """Rewrites a file as earlier versions wrote it."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    header = json.loads(members["vernal.json"])
    assert header.pop("made_by") == [["", "scale_by_adam"]]
    assert header["format"] == 1
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            is_header = name == "vernal.json"
            archive.writestr(name, json.dumps(header) if is_header else content)


@pytest.mark.loose_dtypes
def test_files_of_before(tmp_path):
    trainer = moved(optax.adam(RATE))
    vn.save(tmp_path / "file", trainer)
    without_makers(tmp_path / "file")
    loaded = vn.load(tmp_path / "file", Bowl(START, optax.adam(RATE)))
    assert same(loaded, trainer)
