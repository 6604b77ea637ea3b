"""Type-checks the source, and what users write: documentation, examples, programs here.

`python tests/typing/check.py` runs pyright and mypy, once each, over all that users
write, with the vernal that is installed. A line with a mistake that both must find has
the comment `# caught`; no other line may have an error. The programs here are checked
strictly. Beside that pyright checks the source, and tells whether a type is missing in
what vernal exports. All of it runs at once.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "helpers"))

from pages import PAGES, ROOT, python_of  # noqa: E402

# For each line of each file, what a checker says of it.
Said = dict[tuple[str, int], list[str]]
MARK = "# caught"
# Optax does not say that it has types, so that the bases of these are not known. (A
# trainer's base has a field of the class ParamOptimiser.)
OF_OPTAX = (
    "vernal._optimiser.abstract_transform.AbstractTransform",
    "vernal._optimiser.param_optimiser.ParamOptimiser",
    "vernal._trainer.trainer.Trainer",
)

MYPY = """
[mypy]
python_version = 3.11
ignore_missing_imports = True
# The blocks of a page share their names.
allow_redefinition = True
# `solver = optx.BFGS(...)`: Optimistix leaves parameters of its types open.
disable_error_code = var-annotated
[mypy-optax.*]
follow_untyped_imports = True
[mypy-programs.*]
check_untyped_defs = True
disallow_any_generics = True
disallow_incomplete_defs = True
disallow_subclassing_any = True
disallow_untyped_calls = True
disallow_untyped_decorators = True
disallow_untyped_defs = True
extra_checks = True
strict_equality = True
warn_return_any = True
"""


def copy(folder: Path) -> dict[str, Path]:
    """Copies what is to be checked; returns the origin of each file by its name."""
    origins = {}
    for page in PAGES:
        if "```python" in page.read_text(encoding="utf-8"):
            origins["_".join(page.relative_to(ROOT).with_suffix(".py").parts)] = page
    origins |= {path.name: path for path in (ROOT / "examples").glob("*.py")}
    programs = (path for path in HERE.glob("*.py") if path.name != Path(__file__).name)
    origins |= {f"programs/{path.name}": path for path in programs}
    for name, origin in origins.items():
        text = origin.read_text(encoding="utf-8")
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(python_of(text) if origin.suffix == ".md" else text, "utf-8")
    (folder / "programs" / "__init__.py").touch()
    return origins


def run(folder: Path, *command: str) -> str:
    # Some checkers look for packages by the first `python` that there is.
    first = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PATH": first},
        text=True,
    )
    if done.returncode not in (0, 1):  # it could not check
        raise RuntimeError(f"{command[0]}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def pyright(folder: Path) -> Said:
    (folder / "pyrightconfig.json").write_text('{"pythonVersion": "3.11"}')
    report = json.loads(run(folder, "pyright", "--outputjson"))
    said: Said = defaultdict(list)
    for told in report["generalDiagnostics"]:
        if told["severity"] == "error":
            name = Path(told["file"]).relative_to(folder).as_posix()
            line = told["range"]["start"]["line"] + 1
            said[name, line].append(f"{told['message']} ({told.get('rule')})")
    return said


def mypy(folder: Path) -> Said:
    (folder / "mypy.ini").write_text(MYPY)
    said: Said = defaultdict(list)
    for line in run(folder, "mypy", "--output", "json", ".").splitlines():
        told = json.loads(line)
        if told["severity"] == "error":
            name = Path(told["file"]).as_posix()
            said[name, told["line"]].append(f"{told['message']} ({told['code']})")
    return said


def source() -> list[str]:
    """What pyright says of the source."""
    said = run(ROOT, "pyright")
    return [] if "\n0 errors" in f"\n{said}" else [said]


def incomplete(folder: Path) -> list[str]:
    """What vernal exports without a type that is known."""
    options = "--verifytypes", "vernal", "--ignoreexternal", "--outputjson"
    report = json.loads(run(folder, "pyright", *options))["typeCompleteness"]
    if not report["pyTypedPath"]:
        raise RuntimeError("pyright finds no vernal that says that it has types.")
    return [
        f"{symbol['name']}: {told['message']}"
        for symbol in report["symbols"]
        for told in symbol["diagnostics"]
        if told["severity"] == "error"
        and not (symbol["name"] in OF_OPTAX and "class" in told["message"])
    ]


def main() -> None:
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor() as pool:
        folder = Path(name).resolve()
        origins = copy(folder)
        marked = {
            (name, number)
            for name in origins
            for number, line in enumerate((folder / name).open(encoding="utf-8"), 1)
            if line.rstrip().endswith(MARK)
        }
        checkers = mypy, pyright
        others = [pool.submit(source), pool.submit(incomplete, folder)]
        answers = list(pool.map(lambda check: check(folder), checkers))
    faults = [fault for other in others for fault in other.result()] + [
        f"{origins[name].relative_to(ROOT)}:{line}: {checker.__name__}: "
        + ("\n  ".join(said[name, line]) if (name, line) in said else "not caught")
        for checker, said in zip(checkers, answers, strict=True)
        for name, line in sorted(marked ^ said.keys())
    ]
    for fault in faults:
        print(fault)
    print(f"{len(origins)} files, {len(marked)} mistakes, {len(faults)} faults.")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
