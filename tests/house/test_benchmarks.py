"""The page of the benchmarks is what their writer makes of their figures."""

import importlib
import importlib.util
import json

from pages import ROOT

SPEC = importlib.util.spec_from_file_location(
    "benchmarks_page", ROOT / "tests" / "benchmarks" / "page.py"
)
page = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(page)


def test_the_works_find_what_they_time(monkeypatch):
    """They time parts of vernal too, which may have moved."""
    monkeypatch.syspath_prepend(ROOT)
    assert callable(importlib.import_module("tests.benchmarks.__main__").main)


def test_the_page_is_written_from_its_figures():
    figures = json.loads(page.FIGURES.read_text(encoding="utf-8"))
    assert page.PAGE.read_text(encoding="utf-8") == page.page_of(figures)


def test_the_rows_of_the_readme_are_those_of_the_page():
    readme = page.README.read_text(encoding="utf-8")
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.readme_of(readme, text) == readme
    rows = {line for line in text.splitlines() if line.startswith("| ")}
    assert len(rows & set(readme.splitlines())) == 5  # the head of the table is two
