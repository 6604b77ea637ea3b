"""Least-squares problems with bounds.

The functions are those of Moré, Garbow and Hillstrom, *Testing unconstrained
optimization software*, ACM Transactions on Mathematical Software 7 (1981), and some of
NIST's reference data for nonlinear regression. The bounds cut off the unbounded minimum
of most of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from nist import CURVES, DATA

INF = np.inf


class Problem(NamedTuple):
    """Residuals of a vector, where a fit starts, and the bounds."""

    residuals: Callable[[Any], Any]
    start: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def rosenbrock(x):
    return jnp.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def freudenstein_roth(x):
    a, b = x
    return jnp.stack(
        [-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b]
    )


def powell_badly_scaled(x):
    return jnp.stack([1e4 * x[0] * x[1] - 1, jnp.exp(-x[0]) + jnp.exp(-x[1]) - 1.0001])


def brown_badly_scaled(x):
    return jnp.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


def beale(x):
    y, power = jnp.array([1.5, 2.25, 2.625]), jnp.arange(1.0, 4.0)
    return y - x[0] * (1 - x[1] ** power)


def jennrich_sampson(x):
    i = jnp.arange(1.0, 11.0)
    return 2 + 2 * i - jnp.exp(i * x[0]) - jnp.exp(i * x[1])


def helical_valley(x):
    angle = jnp.arctan2(x[1], x[0]) / (2 * np.pi)
    return jnp.stack([10 * (x[2] - 10 * angle), 10 * (jnp.hypot(x[0], x[1]) - 1), x[2]])


_BARD = np.array(
    [
        *(0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96),
        *(1.34, 2.1, 4.39),
    ]
)


def bard(x):
    u = jnp.arange(1.0, 16.0)
    v, w = 16 - u, jnp.minimum(u, 16 - u)
    return _BARD - (x[0] + u / (v * x[1] + w * x[2]))


_GAUSS = np.array([9, 44, 175, 540, 1295, 2420, 3521, 3989]) * 1e-4


def gaussian(x):
    t = (8 - jnp.arange(1.0, 16.0)) / 2
    y = np.concatenate([_GAUSS, _GAUSS[-2::-1]])
    return x[0] * jnp.exp(-x[1] * (t - x[2]) ** 2 / 2) - y


_MEYER = np.array(
    [
        *(34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030),
        *(6005, 5147, 4427, 3820, 3307, 2872),
    ]
)


def meyer(x):
    t = 45 + 5 * jnp.arange(1.0, 17.0)
    return x[0] * jnp.exp(x[1] / (t + x[2])) - _MEYER


def box(x):
    t = 0.1 * jnp.arange(1.0, 11.0)
    own = jnp.exp(-t) - jnp.exp(-10 * t)
    return jnp.exp(-t * x[0]) - jnp.exp(-t * x[1]) - x[2] * own


def powell_singular(x):
    a, b, c, d = x
    return jnp.stack(
        [a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2]
    )


def wood(x):
    a, b, c, d = x
    return jnp.stack(
        [
            10 * (b - a**2),
            1 - a,
            90**0.5 * (d - c**2),
            1 - c,
            10**0.5 * (b + d - 2),
            10 ** (-0.5) * (b - d),
        ]
    )


_KOWALIK = np.array(
    [
        *(0.1957, 0.1947, 0.1735, 0.16, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323),
        *(0.0235, 0.0246),
    ]
)


def kowalik_osborne(x):
    u = 1 / np.array([0.25, 0.5, 1, 2, 4, 6, 8, 10, 12, 14, 16])
    return _KOWALIK - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def brown_dennis(x):
    t = jnp.arange(1.0, 21.0) / 5
    one, other = x[0] + t * x[1] - jnp.exp(t), x[2] + x[3] * jnp.sin(t) - jnp.cos(t)
    return one**2 + other**2


_OSBORNE = np.array(
    [
        *(0.844, 0.908, 0.932, 0.936, 0.925, 0.908, 0.881, 0.85, 0.818, 0.784),
        *(0.751, 0.718, 0.685, 0.658, 0.628, 0.603, 0.58, 0.558, 0.538, 0.522),
        *(0.506, 0.49, 0.478, 0.467, 0.457, 0.448, 0.438, 0.431, 0.424, 0.42),
        *(0.414, 0.411, 0.406),
    ]
)


def osborne(x):
    t = 10.0 * jnp.arange(33)
    return _OSBORNE - (x[0] + x[1] * jnp.exp(-t * x[3]) + x[2] * jnp.exp(-t * x[4]))


def biggs(x):
    t = 0.1 * jnp.arange(1.0, 14.0)
    y = jnp.exp(-t) - 5 * jnp.exp(-10 * t) + 3 * jnp.exp(-4 * t)
    first = x[2] * jnp.exp(-t * x[0]) - x[3] * jnp.exp(-t * x[1])
    return first + x[5] * jnp.exp(-t * x[4]) - y


def watson(x):
    t, j = jnp.arange(1.0, 30.0)[:, None] / 29, jnp.arange(float(x.size))
    slope = jnp.sum(j[1:] * x[1:] * t ** (j[1:] - 1), axis=1)
    value = jnp.sum(x * t**j, axis=1)
    rows = slope - value**2 - 1
    return jnp.concatenate([rows, jnp.stack([x[0], x[1] - x[0] ** 2 - 1])])


def trigonometric(x):
    n, i = x.size, jnp.arange(1.0, x.size + 1)
    return n - jnp.sum(jnp.cos(x)) + i * (1 - jnp.cos(x)) - jnp.sin(x)


def brown_almost_linear(x):
    rows = x + jnp.sum(x) - (x.size + 1)
    return rows.at[-1].set(jnp.prod(x) - 1)


def broyden_tridiagonal(x):
    pad = jnp.pad(x, 1)
    return (3 - 2 * x) * x - pad[:-2] - 2 * pad[2:] + 1


def penalty(x):
    scale = 1e-5**0.5
    return jnp.append(scale * (x - 1), jnp.sum(x**2) - 0.25)


def variably_dimensioned(x):
    i = jnp.arange(1.0, x.size + 1)
    sum_ = jnp.sum(i * (x - 1))
    return jnp.concatenate([x - 1, jnp.stack([sum_, sum_**2])])


def _same(size, value):
    return (float(value),) * size


def _nist(name, low, high):
    """One of NIST's data sets, from its second start."""
    data, curve = DATA[name], CURVES[name]
    x, y = np.array(data["x"]), np.array(data["y"])
    return Problem(lambda b: curve(b, x) - y, tuple(data["starts"][1]), low, high)


PROBLEMS = {
    "rosenbrock": Problem(rosenbrock, (-1.2, 1.0), (-50, 0), (0.5, 100)),
    "rosenbrock, inactive": Problem(rosenbrock, (-1.2, 1.0), (-2, -2), (2, 2)),
    "freudenstein and roth": Problem(
        freudenstein_roth, (0.5, -2.0), (0, -20), (20, -0.9)
    ),
    "powell badly scaled": Problem(powell_badly_scaled, (0.1, 2.0), (0, 1), (1, 9)),
    "brown badly scaled": Problem(
        brown_badly_scaled, (1.0, 1.0), (0, 3e-5), (1e6, 100)
    ),
    "beale": Problem(beale, (1.0, 1.0), (0.6, 0.5), (10, 100)),
    "jennrich and sampson": Problem(jennrich_sampson, (0.3, 0.4), (0.26, -1), (1, 1)),
    "helical valley": Problem(
        helical_valley, (-1.0, 0.0, 0.0), (-100, -1, -1), (0.8, 1, 1)
    ),
    "bard": Problem(bard, (1.0, 1.0, 1.0), (0.1, 0.5, 0.5), (50, 100, 2.0)),
    "gaussian": Problem(gaussian, (0.4, 1.0, 0.0), (0.398, 1, -0.5), (4.2, 2, 0.1)),
    "meyer": Problem(meyer, (0.02, 4000.0, 250.0), (0.006, 0, 200), (2, 3e5, 3e4)),
    "box": Problem(box, (0.0, 9.0, 5.0), (0, 5, 0), (2, 9.5, 20)),
    "powell singular": Problem(
        powell_singular, (3.0, -1.0, 0.0, 1.0), (0.1, -20, -1, -1), (100, 20, 1, 50)
    ),
    "wood": Problem(wood, (-3.0, -1.0, -3.0, -1.0), _same(4, -100), (0, 10, 100, 100)),
    "kowalik and osborne": Problem(
        kowalik_osborne,
        (0.25, 0.39, 0.415, 0.39),
        (0, -1, 0.13, 0.12),
        (10, 12, 13, 12),
    ),
    "brown and dennis": Problem(
        brown_dennis, (25.0, 5.0, -5.0, -1.0), (-10, 0, -100, -20), (100, 15, 0, 0.2)
    ),
    "osborne": Problem(
        osborne, (0.5, 1.5, -1.0, 0.01, 0.02), (0.4, 0, -1.2, 0, 0), (1, 1.8, 0, 1, 1)
    ),
    "biggs": Problem(
        biggs, (1.0, 2.0, 1.0, 1.0, 1.0, 1.0), (0, 0, 0, 1, 0, 0), (2, 8, 1, 7, 5, 5)
    ),
    "watson, 9": Problem(
        watson,
        _same(9, 0),
        (-1e-5, 0, 0, 0, 0, -3, 0, -3, 0),
        (1e-5, 0.9, 0.1, 1, 1, 0, 4, 0, 2),
    ),
    "trigonometric": Problem(
        trigonometric, _same(10, 0.1), _same(10, 0.05), _same(10, 0.2)
    ),
    "brown almost linear": Problem(
        brown_almost_linear, _same(5, 0.5), _same(5, 0), (2.0, 0.9, 2, 2, 2)
    ),
    "broyden tridiagonal": Problem(
        broyden_tridiagonal, _same(8, -1), _same(8, -1), (-0.6, -0.5, *_same(6, 2))
    ),
    "penalty": Problem(penalty, (1.0, 2.0, 3.0, 0.9), (0, 1, 0, 0), (100, 100, 100, 1)),
    "variably dimensioned": Problem(
        variably_dimensioned, (0.75, 0.5, 0.25, 0.0), (0, 0, 0, 0), (10, 0.9, 10, 0.5)
    ),
    "misra1a": _nist("Misra1a", (245, 0), (INF, 1)),
    "boxbod": _nist("BoxBOD", (0, 0.7), (500, 2)),
    "chwirut2": _nist("Chwirut2", (0, 0.0055, 0), (INF, INF, 0.011)),
    "gauss1": _nist(
        "Gauss1",
        (0, 0, 0, 0, 24, 0, 0, 0),
        (98, INF, INF, 100, 30, 71.5, 300, INF),
    ),
}
