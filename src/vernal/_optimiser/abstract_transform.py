"""The base class of modules that are Optax transformations."""

import abc
import copyreg
import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, dataclass_transform

import equinox as eqx
import jax.tree_util as jtu
import optax
import wadler_lindig as wl

from .._boundary import ModuleMeta


@dataclass_transform(field_specifiers=(dataclasses.field, eqx.field))
class _TupleModuleMeta(ModuleMeta):
    """Makes modules that are named tuples as well.

    JAX rebuilds Equinox's modules by `object.__new__`, which Python refuses for tuples.
    So these are registered here, with the same leaves, paths and static fields.
    """

    if not TYPE_CHECKING:

        def __new__(mcs, name, bases, namespace):
            cls = abc.ABCMeta.__new__(mcs, name, bases, namespace)
            has_init = "__init__" in namespace
            cls = dataclasses.dataclass(eq=False, repr=False, init=not has_init)(cls)
            _register(cls)
            return cls

        # Not Equinox's own, which expects classes that it made itself.
        __call__ = type.__call__


def _register(cls: type) -> None:
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    static = tuple(f.name for f in fields if f.metadata.get("static", False))
    names = tuple(f.name for f in fields if f.name not in static)
    keys, every = tuple(map(jtu.GetAttrKey, names)), names + static

    # Not `vars` and `setattr`, which are slower for modules: every step takes a tree of
    # perhaps a thousand rules apart, and puts it together.
    get, put, new = object.__getattribute__, object.__setattr__, tuple.__new__

    def flatten(module: Any) -> tuple[Any, Any]:
        values = get(module, "__dict__")
        aux = tuple([values[name] for name in static])
        return [values[name] for name in names], aux

    def flatten_with_keys(module: Any) -> tuple[Any, Any]:
        children, aux = flatten(module)
        return list(zip(keys, children, strict=True)), aux

    def unflatten(aux: Any, children: Any) -> Any:
        module = new(cls)
        for name, value in zip(every, (*children, *aux)):  # noqa: B905
            put(module, name, value)
        return module

    jtu.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)


class AbstractTransform(
    eqx.Module, optax.GradientTransformationExtraArgs, metaclass=_TupleModuleMeta
):
    """A pytree that is a gradient transformation to Optax.

    Optax expects a named tuple of two functions. Here the tuple itself is empty: the
    two functions are methods, which subclasses define, and their data are fields.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        return tuple.__new__(cls)

    # `jax.jit(tx.update)` hashes the module that the method is bound to.
    def __hash__(self) -> int:
        return id(self)

    # A field is set once, by `__init__`.
    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self) or name not in type(self).__dataclass_fields__:
            raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")
        object.__setattr__(self, name, value)

    # A tuple would be pickled and copied by its items.
    def __reduce__(self) -> Any:
        return copyreg.__newobj__, (type(self),), dict(vars(self))  # pyright: ignore

    @abc.abstractmethod
    def init(self, params: Any) -> Any:  # pyright: ignore
        """Makes the first state."""

    @abc.abstractmethod
    def update(  # pyright: ignore
        self, updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        """Turns gradients into updates; returns these and the new state."""

    # For `_replace`: with another function it is one of Optax's own transformations.
    @classmethod
    def _make(cls, iterable: Iterable[Any]) -> Any:  # pyright: ignore
        return optax.GradientTransformationExtraArgs(*iterable)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.init, self.update))

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: Any) -> Any:
        return (self.init, self.update)[index]

    # Printers would print a tuple's two methods, each of which prints the tuple.
    def __pdoc__(self, **kwargs: Any) -> wl.AbstractDoc:
        fields = (
            (name, getattr(self, name))
            for name, field in type(self).__dataclass_fields__.items()
            if field.repr
        )
        return wl.bracketed(
            begin=wl.TextDoc(f"{type(self).__name__}("),
            docs=wl.named_objs(fields, **kwargs),
            sep=wl.comma,
            end=wl.TextDoc(")"),
            indent=kwargs.get("indent", 2),
        )
