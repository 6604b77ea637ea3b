"""An example runs again exactly if its code, or what it uses, has changed."""

import os

import pytest

import cached_runs

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

    def __init__(self, folder):
        self.folder, self.cache = folder, folder / "cache"

    def __call__(self):
        script, package = "examples/script.py", "package"
        return cached_runs.run(self.folder / script, self.folder / package, self.cache)

    @property
    def runs(self):
        return len((self.folder / "runs").read_text())


def test_an_example_runs_once(example):
    build = Build(example)
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
def test_a_changed_example_runs_again(example, name, text):
    build = Build(example)
    before, first = (example / name).read_text(), build()
    (example / name).write_text(text)
    assert (build() == first) == name.startswith("package")
    assert build.runs == 2
    (example / name).write_text(before)
    assert build() == first
    assert build.runs == 2


def test_another_version_runs_again(example, monkeypatch):
    build = Build(example)
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
def test_a_damaged_run_is_never_used(example, size):
    build = Build(example)
    fresh = build()
    (entry,) = build.cache.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(whole[:size] if size is not None else whole[:-1] + b"?")
    assert build() == fresh
    assert build.runs == 2
    assert entry.read_bytes() == whole
    assert list(build.cache.iterdir()) == [entry]


def test_what_changes_during_a_run_is_not_kept(example):
    edit = "(here / 'data.csv').write_text('edited')"
    (example / "examples" / "script.py").write_text(f"{SCRIPT}\n{edit}")
    build = Build(example)
    assert build().printed == "first 1, 2\n"
    assert not build.cache.exists()


@pytest.mark.parametrize(
    "fault", ["raise SystemExit(2)", "import warnings; warnings.warn('So.')"]
)
def test_a_run_that_fails_is_not_kept(example, fault):
    (example / "examples" / "script.py").write_text(f"{SCRIPT}\n{fault}")
    build = Build(example)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"script\.py failed"):
            build()
    assert build.runs == 2


def test_runs_that_are_not_used_are_dropped(tmp_path):
    cached_runs.prune(tmp_path / "cache")  # not there yet
    for age in range(5):
        (tmp_path / str(age)).touch()
        os.utime(tmp_path / str(age), (0, -age))
    cached_runs.prune(tmp_path, most=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
