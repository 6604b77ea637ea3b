"""A program is that of the code as it is now, and nothing is compiled without need."""

import gc
import json
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compiled_once
import scripts
import vernal as vn
from inside import reads
from notebook import MODEL, START, Notebook, X
from vernal._program import program


@program
def slopes(trainer, batch):
    """Derivatives of residuals: the least that a program of a trainer may be."""
    residuals = lambda p: trainer.residuals(eqx.combine(p, trainer.model), batch)
    ones = jax.tree.map(jnp.ones_like, trainer.params)
    return jax.jvp(residuals, (trainer.params,), (ones,))[1]


def curvature(trainer):
    """Is 5 for the factor 1, and 20 for 2."""
    return float(np.sum(np.square(slopes(trainer, X))))


SETTINGS = "settings = types.ModuleType('settings')\nsettings.rate = 1.0\n"

# What is read, by way of what, and the change that doubles it.
KINDS = {
    "a global": ("SCALE = 1.0", "SCALE", "SCALE = 2.0"),
    "a helper": (
        "def helper():\n    return 1.0",
        "helper()",
        "def helper():\n    return 2.0",
    ),
    "a helper of a helper": (
        "def inner():\n    return 1.0\ndef helper():\n    return inner()",
        "helper()",
        "def inner():\n    return 2.0",
    ),
    "what a helper of a helper reads": (
        "S = 1.0\ndef inner():\n    return S\ndef helper():\n    return inner()",
        "helper()",
        "S = 2.0",
    ),
    "a class attribute": ("class C:\n    scale = 1.0", "C.scale", "C.scale = 2.0"),
    "an inherited class attribute": (
        "class B:\n    scale = 1.0\nclass C(B): pass",
        "C.scale",
        "B.scale = 2.0",
    ),
    "an attribute that hides one of a base": (
        "class B:\n    scale = 1.0\nclass C(B): pass",
        "C.scale",
        "C.scale = 2.0",
    ),
    "a module": (SETTINGS, "settings.rate", "settings.rate = 2.0"),
    "a module under another name": (
        SETTINGS + "def helper(s):\n    return s.rate",
        "helper(settings)",
        "settings.rate = 2.0",
    ),
    "a module by getattr": (
        SETTINGS,
        "getattr(settings, 'rate')",
        "settings.rate = 2.0",
    ),
    "a chain of attributes": (
        SETTINGS + "settings.optics = types.SimpleNamespace(rate=1.0)",
        "settings.optics.rate",
        "settings.optics.rate = 2.0",
    ),
    "a chain of classes": (
        "class A:\n    class B:\n        class C:\n            rate = 1.0",
        "A.B.C.rate",
        "A.B.C.rate = 2.0",
    ),
    "an object": (
        "class Config: pass\nc = Config()\nc.scale = 1.0",
        "c.scale",
        "c.scale = 2.0",
    ),
    "an object with slots": (
        "class Config:\n    __slots__ = ('scale',)\nc = Config()\nc.scale = 1.0",
        "c.scale",
        "c.scale = 2.0",
    ),
    "an attribute that is new": (
        "class Config: pass\nc = Config()\nc.a = 1.0",
        "getattr(c, 'scale', 1.0)",
        "c.scale = 2.0",
    ),
    "a dataclass": (
        "@dataclasses.dataclass\nclass Config:\n    scale: float\nc = Config(1.0)",
        "c.scale",
        "c.scale = 2.0",
    ),
    "a list": ("numbers = [1.0]", "numbers[0]", "numbers[0] = 2.0"),
    "a longer list": ("numbers = [1.0]", "sum(numbers)", "numbers.append(1.0)"),
    "a dict": ("config = {'scale': 1.0}", "config['scale']", "config['scale'] = 2.0"),
    "an object in containers": (
        "c = types.SimpleNamespace(scale=1.0)\nconfig = {'a': [(c,)]}",
        "config['a'][0][0].scale",
        "c.scale = 2.0",
    ),
    "a set": (
        "found = {1.0}",
        "sum(found)",
        "found |= {0.5, 0.25, 0.125, 0.12, 0.005}",
    ),
    "a partial": (
        "S = 1.0\ndef fn(a):\n    return S * a\nhelper = functools.partial(fn, 1)",
        "helper()",
        "S = 2.0",
    ),
    "an object in a partial": (
        "def read(c):\n    return c['a']\nc = {'a': 1.0}\n"
        "helper = functools.partial(read, c)",
        "helper()",
        "c['a'] = 2.0",
    ),
    "a bound method": (
        "class C:\n    s = 1.0\n    def read(self):\n        return self.s\n"
        "c = C()\nhelper = c.read",
        "helper()",
        "c.s = 2.0",
    ),
    "a decorated function": (
        "S = 1.0\ndef twice(fn):\n    @functools.wraps(fn)\n    def wrapped():\n"
        "        return fn()\n    return wrapped\n@twice\ndef helper():\n    return S",
        "helper()",
        "S = 2.0",
    ),
    "a cached function": (
        "S = 1.0\n@functools.lru_cache\ndef helper():\n    return S",
        "helper.__wrapped__()",
        "S = 2.0",
    ),
    "a compiled helper": (
        "S = 1.0\n@jax.jit\ndef helper(x):\n    return S * x",
        "helper(1.0)",
        "S = 2.0",
    ),
    "a compiled helper of Equinox": (
        "S = 1.0\n@eqx.filter_jit\ndef helper(x):\n    return S * x",
        "helper(1.0)",
        "S = 2.0",
    ),
    "the body of a loop": (
        "S = 1.0\ndef body(c, x):\n    return c * S, None\n"
        "def helper(x):\n    return jax.lax.scan(body, x, jnp.zeros(1))[0]",
        "helper(1.0)",
        "S = 2.0",
    ),
    "a checkpointed helper": (
        "S = 1.0\ndef inner(x):\n    return S * x\nhelper = jax.checkpoint(inner)",
        "helper(1.0)",
        "S = 2.0",
    ),
    "a rule for derivatives": (
        "S = 1.0\n@jax.custom_jvp\ndef helper(x):\n    return x\n"
        "helper.defjvp(lambda p, t: (S * p[0], S * t[0]))",
        "1.0 * helper(self.w) / self.w",
        "S = 2.0",
    ),
    "a default": (
        "def helper(s=1.0):\n    return s",
        "helper()",
        "helper.__defaults__ = (2.0,)",
    ),
    "a default that is changed": (
        "def helper(s=[1.0]):\n    return s[0]",
        "helper()",
        "helper.__defaults__[0][0] = 2.0",
    ),
    "a keyword's default": (
        "def helper(*, s={'a': 1.0}):\n    return s['a']",
        "helper()",
        "helper.__kwdefaults__['s']['a'] = 2.0",
    ),
    "a closure's cell": (
        "def make():\n    s = 1.0\n    def get():\n        return s\n"
        "    def put(new):\n        nonlocal s\n        s = new\n    return get, put\n"
        "get, put = make()",
        "get()",
        "put(2.0)",
    ),
    "the code of a function": (
        "def helper():\n    return 1.0",
        "helper()",
        "helper.__code__ = (lambda: 2.0).__code__",
    ),
    "an array of NumPy": ("a = np.ones(3)", "a.sum() / 3", "a[:] = 2.0"),
    "a large array of NumPy": ("a = np.ones(10**6)", "a[0]", "a[:] = 2.0"),
    "an array of JAX": ("a = jnp.ones(())", "a", "a = a + 1"),
    "a lambda in a comprehension": (
        "S = 1.0\nhelpers = [lambda x, n=n: n * S * x for n in (1.0,)]",
        "sum(f(1.0) for f in helpers)",
        "S = 2.0",
    ),
    "a module of Equinox": (
        "class N(eqx.Module):\n    s: float\nn = N(1.0)",
        "n.s",
        "n = N(2.0)",
    ),
    "a builtin's name": (
        "",
        "float(abs(-1.0))",
        "def abs(x):\n    return 2.0",
    ),
    "an operator of a class": (
        "class Unit:\n    def __mul__(self, other):\n        return 1.0 * other\n"
        "unit = Unit()",
        "unit",
        "Unit.__mul__ = lambda self, other: 2.0 * other",
    ),
    "a compiled method": (
        "S = 1.0\nclass C(eqx.Module):\n    @eqx.filter_jit\n"
        "    def read(self, x):\n        return S * x\nc = C()",
        "c.read(1.0)",
        "S = 2.0",
    ),
    "a function whose types are checked": (
        "from beartype import beartype\nfrom jaxtyping import jaxtyped\nS = 1.0\n"
        "@jaxtyped(typechecker=beartype)\ndef helper(x: float):\n    return S * x",
        "helper(1.0)",
        "S = 2.0",
    ),
    "a named tuple": (
        "class C(NamedTuple):\n    scale: float\n    @property\n"
        "    def twice(self):\n        return self.scale\nc = C(1.0)",
        "c.twice",
        "C.twice = property(lambda self: 2 * self.scale)",
    ),
    "a descriptor": (
        "class D:\n    scale = 1.0\n    def __get__(self, obj, owner):\n"
        "        return self.scale\nclass C:\n    d = D()",
        "C().d",
        "D.scale = 2.0",
    ),
    "a metaclass": (
        "class Meta(type):\n    @property\n    def scale(cls):\n        return 1.0\n"
        "class C(metaclass=Meta): pass",
        "C.scale",
        "Meta.scale = property(lambda cls: 2.0)",
    ),
    "an attribute that is new to a method which is compiled": (
        "class C:\n    s = 1.0\n    def read(self, x):\n        return self.s * x\n"
        "c = C()\nhelper = jax.jit(c.read)",
        "helper(1.0)",
        "c.s = 2.0",
    ),
    "a longer list in the body of a loop": (
        "numbers = [1.0]\ndef body(c, x):\n    return c * sum(numbers), None\n"
        "def helper(x):\n    return jax.lax.scan(body, x, jnp.zeros(1))[0]",
        "helper(1.0)",
        "numbers.append(1.0)",
    ),
    "an attribute that is new to a module": (
        SETTINGS,
        "getattr(settings, 'factor', 1.0)",
        "settings.factor = 2.0",
    ),
    "a module that computes its attributes": (
        SETTINGS + "settings.__getattr__ = lambda name: {'factor': 1.0}[name]",
        "settings.factor",
        "settings.__getattr__ = lambda name: {'factor': 2.0}[name]",
    ),
    "an attribute of an empty namespace": (
        "C = types.SimpleNamespace()",
        "getattr(C, 'scale', 1.0)",
        "C.scale = 2.0",
    ),
    "an attribute of a function without any": (
        "def f(): pass",
        "getattr(f, 'scale', 1.0)",
        "f.scale = 2.0",
    ),
    "an attribute of a function that is compiled": (
        "@jax.jit\ndef f(x):\n    return f.scale * x\nf.scale = 1.0",
        "f(1.0)",
        "f.scale = 2.0",
    ),
    "an attribute that gets another name": (
        "class C: pass\nc = C()\nc.one = True",
        "1.0 if hasattr(c, 'one') else 2.0",
        "del c.one\nc.two = True",
    ),
    "a class attribute that gets another name": (
        "class C:\n    one = True",
        "1.0 if hasattr(C, 'one') else 2.0",
        "del C.one\nC.two = True",
    ),
    "a method of a dictionary": (
        "d = {'scale': 1.0}\nget = d.get",
        "get('scale')",
        "d['scale'] = 2.0",
    ),
    "the values of a dictionary": (
        "d = {'scale': 1.0}\nvalues = d.values()",
        "max(values)",
        "d['scale'] = 2.0",
    ),
    "a class that a function makes": (
        "C = dataclasses.make_dataclass('C', [('scale', float, 1.0)])",
        "C.scale",
        "C.scale = 2.0",
    ),
    "a class made by a call": (
        "S = 1.0\nC = type('C', (eqx.Module,), {'read': lambda self: S})",
        "C().read()",
        "S = 2.0",
    ),
    "an array of objects": ("a = np.array([1.0, None])", "a[0]", "a[0] = 2.0"),
    "the mask of an array": (
        "a = np.ma.masked_array([1.0, 2.0], mask=[0, 1])",
        "float(a.max())",
        "a.mask = [0, 0]",
    ),
    "an object that computes its attributes": (
        "class C:\n    __slots__ = ('d',)\n    def __getattr__(self, name):\n"
        "        return self.d[name]\nc = C()\nc.d = {'s': 1.0}",
        "c.s",
        "c.d['s'] = 2.0",
    ),
    "a relative import": (
        "import sys\nfor n in ('vn_a', 'vn_a.b', 'vn_a.s', 's'):\n"
        "    sys.modules[n] = types.ModuleType(n)\ns = sys.modules['vn_a.s']\n"
        "s.rate = 1.0\n__package__ = 'vn_a.b'\n"
        "def helper():\n    from ..s import rate\n    return rate",
        "helper()",
        "s.rate = 2.0",
    ),
    "an import within a function": (
        SETTINGS + "import sys; sys.modules['vn_test_settings'] = settings\n"
        "def helper():\n    from vn_test_settings import rate\n    return rate",
        "helper()",
        "settings.rate = 2.0",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_reads(kind):
    before, expression, change = KINDS[kind]
    book = Notebook(before, MODEL.format(f"({expression})"))
    trainer = book["trainer"]()
    assert curvature(trainer) == pytest.approx(5.0)
    count = len(book["traces"])
    # Neither an equal trainer nor an unrelated change compiles anything.
    book.run("unrelated = 1.0")
    assert curvature(trainer) == curvature(book["trainer"]()) == pytest.approx(5.0)
    assert len(book["traces"]) == count
    book.run(change)
    assert curvature(trainer) == pytest.approx(20.0)
    count = len(book["traces"])
    assert curvature(book["trainer"]()) == curvature(trainer) == pytest.approx(20.0)
    assert len(book["traces"]) == count


# Static values that are equal for Python, and lead to 5 and to 20.
EQUAL = {
    "a number and a truth value": ("1", "True", "2.0 if s is True else 1.0"),
    "numbers of two types": ("1", "1.0", "2.0 if isinstance(s, float) else 1.0"),
    "within a tuple": ("(1,)", "(True,)", "2.0 if s[0] is True else 1.0"),
    "zeros of two signs": ("0.0", "-0.0", "2.0 if str(s) == '-0.0' else 1.0"),
    "a field that is not compared": ("Band(1.0)", "Band(2.0)", "s.width"),
}
BAND = """
@dataclasses.dataclass(frozen=True)
class Band:
    width: float = dataclasses.field(compare=False)

class M(eqx.Module):
    w: jax.Array
    s: Any = eqx.field(static=True)
    def __call__(self, x):
        s = self.s
        return {} * self.w * x
"""


@pytest.mark.parametrize("kind", EQUAL)
def test_static_values_that_are_equal(kind):
    *values, expression = EQUAL[kind]
    book = Notebook(BAND.format(f"({expression})"))
    made = []
    for value, expected in zip(values, (5.0, 20.0), strict=True):
        book.run(f"own = M(jnp.ones(()), {value})")
        made.append(book["trainer"](book["own"]))
        assert curvature(made[-1]) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"model\.s: static, was"):
        vn.fit_many(made, X, 1)


# Static values made anew, which are equal: nothing differs.
ANEW = {
    "a slice": "slice(0, 3)",
    "an ordered dictionary": "collections.OrderedDict(a=1)",
    "a proxy": "types.MappingProxyType({'a': 1})",
    "a frozen dataclass": "Band(1.0)",
    "a dataclass with a field that is not set": "Unset(1)",
    "a dataclass with a dictionary": "Cached(1)",
    "a dataclass that is its own parent": "Node.make()",
    "text of a class": "Text('a')",
    "what has a hash": "Own(1)",
    "a module": "eqx.nn.Lambda(jnp.sin)",
}
OF_ANEW = """
import collections
@dataclasses.dataclass(frozen=True)
class Unset:
    n: int
    c: Any = dataclasses.field(init=False, compare=False, repr=False)
@dataclasses.dataclass(frozen=True)
class Cached:
    n: int
    c: dict = dataclasses.field(default_factory=dict, compare=False)
@dataclasses.dataclass(frozen=True)
class Node:
    n: int
    parent: Any = dataclasses.field(default=None, compare=False)
    @classmethod
    def make(cls):
        node = cls(1)
        object.__setattr__(node, "parent", (node,))
        return node
class Text(str): pass
class Own:
    def __init__(self, n): self.n = n
    def __eq__(self, other): return type(self) is type(other) and self.n == other.n
    def __hash__(self): return hash(self.n)
"""


@pytest.mark.parametrize("kind", ANEW)
def test_static_values_made_anew(kind):
    book = Notebook(BAND.format("1.0"), OF_ANEW)
    made = []
    for _ in range(2):
        book.run(f"own = M(jnp.ones(()), {ANEW[kind]})")
        made.append(book["trainer"](book["own"]))
        assert curvature(made[-1]) == pytest.approx(5.0)
    assert len(book["traces"]) == 1
    assert len(vn.fit_many(made, X, 0).best_losses) == 2


# What can change is known by its identity, though it is equal to another one.
RATE = """
@dataclasses.dataclass(unsafe_hash=True)
class Rate:
    value: float
    def __call__(self, x):
        return self.value * x

class M(eqx.Module):
    w: jax.Array
    rate: Any
    def __call__(self, x):
        return self.rate(self.w * x)

one, other = Rate(1.0), Rate(1.0)
"""


def test_equal_objects_that_change():
    book = Notebook(RATE)
    make = lambda name: book["trainer"](book["M"](jnp.ones(()), book[name]))
    trainers = make("one"), make("other")
    assert [curvature(t) for t in trainers] == pytest.approx([5.0, 5.0])
    assert trainers[1].model.rate is book["other"]
    book.run("other.value = 2.0")
    assert [curvature(t) for t in trainers] == pytest.approx([5.0, 20.0])
    book.run("one.value = 2.0\nother.value = 1.0")
    assert [curvature(t) for t in trainers] == pytest.approx([20.0, 5.0])


def test_more_objects_than_are_followed(monkeypatch):
    monkeypatch.setattr(reads, "_MOST_OBJECTS", 1_000)
    book = Notebook("many = [{i: [j] for i in range(50)} for j in range(50)]")
    book.run(MODEL.format("len(many) / 50"))
    with pytest.warns(UserWarning, match="reads more than 20,000 objects"):
        assert curvature(book["trainer"]()) == pytest.approx(5.0)


METHODS = """
class Base(eqx.Module):
    w: jax.Array
    factor = 1.0
    def get(self):
        return self.factor
    @property
    def prop(self):
        return self.factor
    @staticmethod
    def static():
        return SCALE
    @classmethod
    def of_class(cls):
        return cls.factor
    def __call__(self, x):
        return {} * self.w * x

class M(Base):
    pass
"""


@pytest.mark.parametrize("name", ["get()", "prop", "static()", "of_class()"])
@pytest.mark.parametrize("change", ["data", "code"])
def test_methods_that_are_inherited(name, change):
    book = Notebook("SCALE = 1.0", METHODS.format(f"self.{name}"))
    trainer = book["trainer"]()
    assert curvature(trainer) == pytest.approx(5.0)
    if change == "data":
        book.run("SCALE = 2.0; Base.factor = 2.0")
    else:
        book.run("Base.__call__ = lambda self, x: 2.0 * self.w * x")
    assert curvature(trainer) == pytest.approx(20.0)
    book.run("M.__call__ = lambda self, x: self.w * x")
    assert curvature(trainer) == pytest.approx(5.0)


STATIC = """
class Config:
    scale = 1.0
class M(eqx.Module):
    w: jax.Array
    c: Any = eqx.field(static=True)
    def __call__(self, x):
        return self.c.scale * self.w * x
config = Config()
"""

LEAF = """
class M(eqx.Module):
    w: jax.Array
    f: Any
    def __call__(self, x):
        return self.f(x) * self.w
SCALE = 1.0
def leaf(x):
    return SCALE * x
class Leaf:
    scale = 1.0
    def __call__(self, x):
        return self.scale * x
"""

MODELS = {
    "an object in a static field": (
        STATIC,
        "M(jnp.ones(()), config)",
        "config.scale = 2.0",
    ),
    "its class": (STATIC, "M(jnp.ones(()), config)", "Config.scale = 2.0"),
    "a function as a leaf": (LEAF, "M(jnp.ones(()), leaf)", "SCALE = 2.0"),
    "a lambda as a leaf": (
        LEAF,
        "M(jnp.ones(()), lambda x: leaf(x))",
        "def leaf(x):\n    return 2 * x",
    ),
    "an object as a leaf": (LEAF, "M(jnp.ones(()), Leaf())", "Leaf.scale = 2.0"),
    "an attribute of such an object": (
        LEAF + "own = Leaf()",
        "M(jnp.ones(()), own)",
        "own.scale = 2.0",
    ),
    "a function in a layer of a library": (
        LEAF,
        "M(jnp.ones(()), eqx.nn.Lambda(leaf))",
        "SCALE = 2.0",
    ),
    "a method as a leaf": (
        LEAF + "own = Leaf()",
        "M(jnp.ones(()), own.__call__)",
        "own.scale = 2.0",
    ),
    "a partial as a leaf": (
        LEAF,
        "M(jnp.ones(()), functools.partial(leaf))",
        "SCALE = 2.0",
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_holds(kind):
    cell, model, change = MODELS[kind]
    book = Notebook(cell, f"start = {model}")
    trainer = book["trainer"](book["start"])
    assert curvature(trainer) == pytest.approx(5.0)
    count = len(book["traces"])
    assert curvature(trainer.replace(model=book["start"])) == pytest.approx(5.0)
    assert len(book["traces"]) == count
    book.run(change)
    assert curvature(trainer) == pytest.approx(20.0)


HOOKS = {
    "loss": "def loss(self, m, x): return N * jnp.sum((m(x) - 6 * x) ** 2)",
    "constrain": ("def constrain(self, m): return jax.tree.map(lambda w: w + N, m)"),
    "transform_grads": (
        "def transform_grads(self, g, m): return jax.tree.map(lambda g: N * g, g)"
    ),
}


@pytest.mark.filterwarnings("ignore::vernal.ObjectiveWarning")
@pytest.mark.parametrize("hook", HOOKS)
def test_methods_of_the_trainer(hook):
    book = Notebook("N = 1.0", MODEL.format("1.0"))
    book.run(f"class T(T):\n    {HOOKS[hook]}")
    book.run("class T(T): pass")
    trainer = book["trainer"]()
    step = lambda: float(trainer.step(X)[0].params.w)
    one, again = step(), step()
    book.run("N = 2.0")
    two = step()
    book.run("N = 1.0")
    assert one == again == step() != two


def test_evaluate():
    book = Notebook("N = 1.0", MODEL.format("1.0"))
    book.run("class T(T):\n    def evaluate(self, m, x): return N * m.w")
    trainer = book["trainer"]()
    score = lambda: trainer.fit(X, 1, validation=(X, 1)).history
    one = score().validation[0]
    book.run("N = 2.0")
    assert score().validation[0] == 2 * one


POLICY = """
N = 1.0
class Scaling(vn.NanPolicy):
    def init(self, params):
        return None
    def apply(self, loss, grads, state):
        grads = jax.tree.map(lambda g: N * g, grads)
        return grads, vn.Verdict(accept=jnp.array(True), stop=jnp.array(False)), state
class Enough(vn.StopCriterion):
    def init(self, params):
        return None
    def apply(self, view, state):
        return view.step_count >= int(3 * N), state
def schedule(count):
    return 0.01 * N
"""


@pytest.mark.parametrize("what", ["policy", "schedule", "schedule of a rule"])
def test_what_a_step_is_given(what):
    book = Notebook(MODEL.format("1.0"), POLICY)
    options = {"nan_policy": book["Scaling"]()} if what == "policy" else {}
    tx = optax.sgd(0.01 if what == "policy" else book["schedule"])
    if what == "schedule of a rule":
        tx = vn.ParamOptimiser({"w": tx})
    trainer = book["T"](book["M"](jnp.ones(())), tx, **options)
    step = lambda: float(trainer.step(X)[0].params.w) - 1
    one = step()
    book.run("N = 2.0")
    assert step() == pytest.approx(2 * one, rel=1e-5)


def test_a_criterion():
    book = Notebook(MODEL.format("1.0"), POLICY)
    trainer, stop = book["trainer"](), book["Enough"]()
    count = lambda: int(trainer.fit(X, 50, stop=stop).trainer.step_count)
    assert count() == 3
    book.run("N = 2.0")
    assert count() == 6


def test_a_change_during_a_fit_counts_from_the_next_chunk():
    book = Notebook("SCALE = 1.0", MODEL.format("SCALE"))

    def callback(trainer, history):
        if int(trainer.step_count) == 100:
            book.run("SCALE = 2.0")

    fit = book["trainer"]().fit(X, 300, chunk=100, callback=callback)
    assert float(fit.model.w) == pytest.approx(3.0, rel=1e-4)


@pytest.mark.seams
def test_cells_that_are_run_again():
    helper = "def helper(x):\n    return SCALE * x"
    book = Notebook("SCALE = 1.0", helper, MODEL.format("helper(1.0)"))
    trainer = book["trainer"]()
    curvature(trainer)
    count = len(book["traces"])
    # Equal text and equal values: nothing new.
    book.run(helper)
    book.run("SCALE = 1.0")
    curvature(trainer)
    assert len(book["traces"]) == count
    book.run(helper.replace("SCALE", "2.0"))
    assert curvature(trainer) == pytest.approx(20.0)


@pytest.mark.seams
def test_two_models_share_a_helper_that_jax_keeps():
    """JAX keeps the trace of a loop's body by itself, whichever model it was for."""
    body = "S = 1.0\ndef body(c, x):\n    return c * S, None\n"
    scan = "jax.lax.scan(body, 1.0, jnp.zeros(1))[0]"
    book = Notebook(body, MODEL.format(scan))
    assert curvature(book["trainer"]()) == pytest.approx(5.0)
    book.run("S = 2.0")
    book.run(MODEL.format(scan))
    assert curvature(book["trainer"]()) == pytest.approx(20.0)


WRITES = {
    "a list": ("log = []", "log.append(1)"),
    "a counter": ("class C: n = 0\nc = C()\nc.n = 0", "c.__dict__.update(n=c.n + 1)"),
    "a new attribute": (
        "class C: pass\nc = C()",
        "c.__dict__.setdefault('cached', 3.0)",
    ),
    "a dict": ("log = {}", "log.setdefault(len(log), 1)"),
    "a global": (
        "n = 0\ndef count():\n    global n\n    n += 1",
        "count()",
    ),
    "a class": ("class C: n = 0", "setattr(C, 'n', C.n + 1)"),
    "an array": ("a = np.zeros(2)", "a.__iadd__(1)"),
    "from the device": (
        "log = []",
        "jax.debug.callback(lambda x: log.append(1), self.w)",
    ),
}


@pytest.mark.parametrize("kind", WRITES)
def test_what_a_program_writes_to_compiles_nothing_anew(kind):
    before, expression = WRITES[kind]
    book = Notebook("SCALE = 1.0", before, MODEL.format(f"({expression}, SCALE)[1]"))
    trainer = book["trainer"]()
    curvature(trainer)
    count = len(book["traces"])
    for _ in range(3):
        curvature(trainer)
    assert len(book["traces"]) == count
    book.run("SCALE = 2.0")
    assert curvature(trainer) == pytest.approx(20.0)


def test_what_is_beside_what_a_program_writes_to_is_seen():
    cell = """
    class C: pass
    c = C()
    c.scale, c.count = 1.0, 0
    def read():
        c.count += 1
        c.last = c.count
        return c.scale
    """
    book = Notebook(cell, MODEL.format("read()"))
    trainer = book["trainer"]()
    assert curvature(trainer) == pytest.approx(5.0)
    count = book["c"].count
    assert curvature(trainer) == pytest.approx(5.0)
    assert book["c"].count == count
    book.run("c.scale = 2.0")
    assert curvature(trainer) == pytest.approx(20.0)
    book.run("C.scale = 3.0; del c.scale")
    assert curvature(trainer) == pytest.approx(45.0)


def test_forget(tmp_path):
    path = tmp_path / "scale"
    path.write_text("1.0")
    book = Notebook("from pathlib import Path", f"path = {str(path)!r}")
    book.run(MODEL.format("float(Path(path).read_text())"))
    own = jax.jit(lambda x: x + 1)
    own(1.0)
    trainer = book["trainer"]()
    assert curvature(trainer) == pytest.approx(5.0)
    path.write_text("2.0")
    assert curvature(trainer) == pytest.approx(5.0)
    vn.forget()
    assert curvature(trainer) == pytest.approx(20.0)
    assert own._cache_size() == 1


@pytest.mark.seams
def test_forget_reaches_what_jax_keeps():
    hidden = "globals()['val' + 'ues'][0]"
    helper = f"values = [1.0]\n@jax.jit\ndef helper(x):\n    return {hidden} * x"
    book = Notebook(helper, MODEL.format("helper(1.0)"))
    trainer = book["trainer"]()
    assert curvature(trainer) == pytest.approx(5.0)
    book.run("values[0] = 2.0")
    vn.forget()
    assert curvature(trainer) == pytest.approx(20.0)


def test_nothing_outlives_its_programs():
    book = Notebook("class Big: pass\nbig = Big()\nbig.scale = 1.0")
    book.run(MODEL.format("big.scale"))
    curvature(book["trainer"]())
    dead = weakref.ref(book["big"])
    book.run("big = None")
    vn.forget()
    gc.collect()
    assert dead() is None


def test_a_namespace_without_a_name_is_followed_too():
    names = {}
    for cell in (START, "SCALE = 1.0", MODEL.format("SCALE"), "fitted = trainer()"):
        exec(cell, names)
    assert names["M"].__module__ == "builtins"
    assert curvature(names["fitted"]) == 5
    exec("SCALE = 2.0", names)
    assert curvature(names["fitted"]) == 20


def test_a_script_that_is_run_again_compiles_nothing(tmp_path):
    """JAX finds programs in a folder by what they are, which is the same each time."""

    def run():
        log = tmp_path / "log"
        process = scripts.started(
            compiled_once.__file__, str(tmp_path / "kept"), log=log
        )
        process.join()
        assert process.exitcode == 0, log.read_text()
        return json.loads(log.read_text())

    (_, compiled, answers), (found, again, same) = run(), run()
    assert compiled > 20
    assert again == 0
    assert found >= compiled
    assert same == answers
