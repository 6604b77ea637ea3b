"""Every public name is documented once, and every code block of the prose runs."""

import importlib.util
import os
import re
import subprocess
import sys
from types import ModuleType

import pytest

import vernal
import vernal.plot
from pages import PAGES, ROOT, python_of

PUBLIC = sorted(
    name
    for name, value in vars(vernal).items()
    if not name.startswith("_") and not isinstance(value, ModuleType)
)
PLOTS = sorted(
    name
    for name, value in vars(vernal.plot).items()
    if getattr(value, "__module__", None) == "vernal.plot" and not name.startswith("_")
)
OUTPUT = re.compile(r"^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_every_public_name_is_documented_once():
    documented = [
        name
        for page in (ROOT / "docs" / "api").glob("*.md")
        for name in re.findall(r"^::: vernal\.(.+)$", page.read_text(), re.MULTILINE)
    ]
    assert sorted(documented) == sorted([*PUBLIC, *(f"plot.{name}" for name in PLOTS)])


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_docstring(name):
    assert (getattr(vernal, name).__doc__ or "").strip()


@pytest.mark.parametrize("name", PLOTS)
def test_public_plot_has_a_docstring(name):
    assert (getattr(vernal.plot, name).__doc__ or "").strip()


@pytest.mark.as_compiled
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_code_blocks_run_and_print_what_is_shown(page, tmp_path):
    script, text = tmp_path / "blocks.py", page.read_text(encoding="utf-8")
    script.write_text(python_of(text), encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-W", "error", script],
        capture_output=True,
        check=False,
        cwd=tmp_path,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    for shown in OUTPUT.findall(text):
        assert shown in run.stdout


# A script that counts its runs, draws, and uses a script beside it and a file.
SCRIPT = """
import sys
from pathlib import Path

from helper import word

here = Path(__file__).parent
with (here.parent / "runs").open("a") as runs:
    runs.write(".")
print(word, (here / "data.csv").read_text())
(Path(sys.argv[2]) / "script.png").write_bytes(b"\\x89PNG\\0" + word.encode())
"""


@pytest.fixture(scope="module")
def cached_runs():
    """What `docs/hooks.py` runs the examples with."""
    path = ROOT / "docs" / "cached_runs.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def example(tmp_path):
    """A folder with an example, and one with the package that it uses."""
    files = {
        "examples/script.py": SCRIPT,
        "examples/helper.py": "word = 'first'",
        "examples/data.csv": "1, 2",
        "package/__init__.py": "",
        "package/_private/file.py": "x = 1",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


class Build:
    """Builds the page of an example again and again; counts the runs of its script."""

    def __init__(self, module, folder):
        self.module, self.folder, self.cache = module, folder, folder / "cache"

    def __call__(self):
        script, package = (
            self.folder / "examples" / "script.py",
            self.folder / "package",
        )
        return self.module.run(script, package, self.cache)

    @property
    def runs(self):
        return len((self.folder / "runs").read_text())


def test_an_example_runs_once(cached_runs, example):
    build = Build(cached_runs, example)
    fresh = build()
    assert fresh == ("first 1, 2\n", b"\x89PNG\0first")
    (example / "examples" / "another.py").write_text("print('not imported')")
    for name in ("examples/script.py", "examples/helper.py", "package/__init__.py"):
        text = (example / name).read_text()
        (example / name).write_text(f'"""Prose."""\n# And more.\n{text}')
    assert build() == fresh
    assert build.runs == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("examples/script.py", SCRIPT + "print()"),
        ("examples/helper.py", "word = 'second'"),
        ("examples/data.csv", "1, 3"),
        ("package/_private/file.py", "x = 2"),
    ],
)
def test_a_changed_example_runs_again(cached_runs, example, name, text):
    build = Build(cached_runs, example)
    before, first = (example / name).read_text(), build()
    (example / name).write_text(text)
    assert (build() == first) == name.startswith("package")
    assert build.runs == 2
    (example / name).write_text(before)
    assert build() == first
    assert build.runs == 2


def test_another_version_runs_again(cached_runs, example, monkeypatch):
    build = Build(cached_runs, example)
    build()
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    cached_runs.environment.cache_clear()
    build()
    found = list(cached_runs.distributions())
    monkeypatch.setattr(cached_runs, "distributions", lambda: found[1:])
    cached_runs.environment.cache_clear()
    build()
    assert build.runs == 3


@pytest.mark.parametrize("size", [0, 20, 32, 40, None])
def test_a_damaged_run_is_never_used(cached_runs, example, size):
    build = Build(cached_runs, example)
    fresh = build()
    (entry,) = build.cache.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(whole[:size] if size is not None else whole[:-1] + b"?")
    assert build() == fresh
    assert build.runs == 2
    assert entry.read_bytes() == whole
    assert list(build.cache.iterdir()) == [entry]


def test_what_changes_during_a_run_is_not_kept(cached_runs, example):
    edit = "(here / 'data.csv').write_text('edited')"
    (example / "examples" / "script.py").write_text(f"{SCRIPT}\n{edit}")
    build = Build(cached_runs, example)
    assert build().printed == "first 1, 2\n"
    assert not build.cache.exists()


@pytest.mark.parametrize(
    "fault", ["raise SystemExit(2)", "import warnings; warnings.warn('So.')"]
)
def test_a_run_that_fails_is_not_kept(cached_runs, example, fault):
    (example / "examples" / "script.py").write_text(f"{SCRIPT}\n{fault}")
    build = Build(cached_runs, example)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"script\.py failed"):
            build()
    assert build.runs == 2


def test_runs_that_are_not_used_are_dropped(cached_runs, tmp_path):
    cached_runs.prune(tmp_path / "cache")  # not there yet
    for age in range(5):
        (tmp_path / str(age)).touch()
        os.utime(tmp_path / str(age), (0, -age))
    cached_runs.prune(tmp_path, most=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
