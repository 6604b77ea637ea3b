"""Measures works, and writes the page of all figures: `python -m tests.benchmarks`."""

import argparse
import datetime
import os
import platform
from importlib.metadata import distributions, version
from itertools import chain
from pathlib import Path

from . import curvature, fits, large, options, peers, profiles, rules, solving
from .measure import FAILED, apart, device
from .page import Row, write

LIBRARIES = ("vernal", "jax", "jaxlib", "equinox", "optax", "optimistix", "matfree")
PEERS = ("flowjax", "flax", "zodiax")
# The parts of the page: the option, the heading, and the works of each section.
PARTS = {
    "main": (
        "",
        "Fits",
        {
            "`fit`, `fit_many` and `step`": fits.works,
            "`whiten`, `solve` and `from_matvec`": lambda: chain(
                solving.works(), curvature.works()
            ),
            "Profile likelihood and `report`": profiles.works,
            "Other libraries": peers.works,
        },
    ),
    "slow": (
        " -- --slow",
        "More",
        {
            "Many leaves": lambda: chain(large.works(), rules.works()),
            "Options of a fit": options.works,
            "Curvature and solvers": lambda: chain(curvature.more(), solving.more()),
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__
    )
    parser.add_argument("names", nargs="*", help="works to measure, without a page")
    parser.add_argument("--slow", action="store_true", help="the page's second part")
    parser.add_argument("--rounds", type=int, help="measure less often, to try it out")
    parser.add_argument("--list", action="store_true", help="print the names alone")
    asked = parser.parse_args()
    part = "slow" if asked.slow else "main"
    parts = PARTS.values() if asked.names or asked.list else [PARTS[part]]
    works = [
        (section, work)
        for _, _, sections in parts
        for section, make in sections.items()
        for work in make()
    ]
    names = dict.fromkeys(work.name for _, work in works)
    if asked.list:
        print(*names, sep="\n")
        return
    if unknown := set(asked.names) - set(names):
        parser.error(f"no work has the name {', '.join(sorted(unknown))}; see --list")
    found: dict[str, list[Row]] = {}
    for section, work in works:
        if asked.names and work.name not in asked.names:
            continue
        for row in work.rows(asked.rounds):
            found.setdefault(section, []).append(row)
            goal = "" if row.goal is None else f"(goal {row.goal:g})"
            told = (work.name, row.told, row.precision, row.against, row.shown())
            print(*told, goal, sep="  ", flush=True)
    if not asked.names:
        option, title, _ = PARTS[part]
        write(part, title, made(option, asked.rounds), found)
    if any(row.against == FAILED for rows in found.values() for row in rows):
        parser.exit(1, "some works have failed\n")


def made(option: str, rounds: int | None) -> str:
    """When, how and on what the figures were made."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    _, _, model = text.partition("model name")
    processor = model.split("\n")[0].strip("\t :") or platform.processor()
    day = f"{datetime.date.today():%-d %B %Y}"
    command = f"nox -s bench{option}"
    quick = "" if rounds is None else f" A quick run: rounds of each work: {rounds}."
    cores = f"{len(os.sched_getaffinity(0))} cores{apart('float32', device)}"
    installed = {dist.name for dist in distributions()}
    names = [name for name in (*LIBRARIES, *PEERS) if name in installed]
    libraries = ", ".join(f"{name} {version(name)}" for name in names)
    return (
        f"Measured on {day} by `{command}`, on {processor}, {cores};\n"
        f"Python {platform.python_version()}, {libraries}.{quick}"
    )


if __name__ == "__main__":
    main()
