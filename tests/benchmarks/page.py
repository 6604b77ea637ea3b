"""The page of the figures, and its rows in the README, from what was measured.

It needs nothing but Python, so that a test can write the page again.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FIGURES, PAGE = ROOT / "docs" / "benchmarks.json", ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"

READ = """# Benchmarks

Each row compares vernal with another program for the same computation: one written by
hand, unless the row names another. "By hand" is the time of that program. "Ratio" is
the time of vernal divided by it: 1.00 is as fast, 2.00 takes twice as long. Both run in
turns in one process, and the ratio is the median of several rounds. A first call, which
compiles, has a process of its own, and the ratio is the median of two. "Met" says
whether the ratio is at most the goal; a row without a goal is for comparison. An idle
machine changes a ratio by a few hundredths from run to run.

By hand, a fit is one `lax.scan` that takes the steps of Optax, returns the losses, and
does nothing else. A light curve, and a line, has five parameters with an Adam for each.
An MLP has three hidden layers of that many units, and batches of 128. In the rows of
other libraries, "ratio" is their time divided by that of the scan; all of them have one
Adam for the whole model. "Small loops compiled whole": both programs have the option of
XLA that [makes small fits fast](costs.md#small-models-on-a-cpu).
"""
COLUMNS = (
    "work",
    *("by hand, float32", "ratio"),
    *("by hand, float64", "ratio"),
    *("goal", "met"),
)


@dataclass(frozen=True)
class Row:
    """One figure. Without a value, `against` says why there is none."""

    told: str
    precision: str
    against: str
    value: float | None
    unit: str = ""
    goal: float | None = None

    def shown(self) -> str:
        if self.value is None:
            return "–"
        return f"{self.value:.3g} {self.unit}" if self.unit else f"{self.value:.2f}"

    def is_met(self) -> bool | None:
        """Whether what the page shows is as small as it should be."""
        if self.goal is None or self.value is None:
            return None
        return float(self.shown().split()[0]) <= self.goal


def cells(rows: Iterable[Row]) -> list[str]:
    """The line of one work, in both precisions."""
    found = {row.precision: row for row in rows}
    first = next(iter(found.values()))
    line = [first.told]
    for precision in "float32", "float64":
        row = found.get(precision)
        line += ["", ""] if row is None else [row.against, row.shown()]
    line.append("" if first.goal is None else f"{first.goal:g} {first.unit}".strip())
    met = {name: row.is_met() for name, row in found.items()}
    if None in met.values():
        return [*line, ""]
    if len(set(met.values())) == 1:
        return [*line, "yes" if all(met.values()) else "**no**"]
    return [*line, next(f"{name} only" for name, is_met in met.items() if is_met)]


def table(section: Iterable[dict[str, Any]]) -> str:
    """One table, without the columns in which nothing stands."""
    rows = [Row(**row) for row in section]
    lines = [cells(same) for _, same in groupby(rows, key=lambda row: row.told)]
    kept = [i for i in range(len(COLUMNS)) if any(line[i] for line in lines)]
    head = [COLUMNS, ["---"] * len(COLUMNS)]
    shown = [" | ".join(line[i] for i in kept) for line in [*head, *lines]]
    return "".join(f"| {line} |\n".replace("  ", " ") for line in shown)


def page_of(figures: dict[str, Any]) -> str:
    """The page, in Markdown."""
    text = READ
    for part in figures.values():
        rows = [Row(**row) for section in part["sections"].values() for row in section]
        met = [is_met for row in rows if (is_met := row.is_met()) is not None]
        text += f"\n## {part['title']}\n\n{part['made']}\n"
        text += f"{sum(met)} of {len(met)} goals are met.\n"
        for title, section in part["sections"].items():
            text += f"\n### {title}\n\n{table(section)}"
    return text


def readme_of(readme: str, page: str) -> str:
    """The README, with the page's lines for its own."""
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    # Tables have a head in common: the README's is that of the first.
    current = {line.split(" | ")[0]: line for line in reversed(lines)}
    return "".join(
        current[name] + "\n" if (name := line.split(" | ")[0]) in current else line
        for line in readme.splitlines(keepends=True)
    )


def write(part: str, title: str, made: str, sections: dict[str, list[Row]]) -> None:
    """Renews one part of the page, and keeps the other as it was measured."""
    figures = json.loads(FIGURES.read_text("utf-8")) if FIGURES.exists() else {}
    told = {name: list(map(asdict, rows)) for name, rows in sections.items()}
    figures[part] = {"title": title, "made": made, "sections": told}
    figures = dict(sorted(figures.items()))
    text = json.dumps(figures, indent=1, ensure_ascii=False)
    FIGURES.write_text(text + "\n", "utf-8")
    page = page_of(figures)
    PAGE.write_text(page, "utf-8")
    README.write_text(readme_of(README.read_text("utf-8"), page), "utf-8")
