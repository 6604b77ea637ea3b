"""What each example prints and draws, from a cache where its code has not changed."""

import ast
import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import scripts


class Run(NamedTuple):
    """What a script printed, and the bytes of its picture."""

    printed: str
    picture: bytes


def run(script: Path, package: Path, cache: Path) -> Run:
    """Returns what a folder keeps of a script, or runs it and keeps that.

    A file's name there is what was run. What is edited while it runs is not kept.
    """
    name = name_of(script, package)
    kept = read(cache / name)
    if kept is None:
        kept = execute(script)
        if name_of(script, package) == name:
            write(cache / name, kept)
    else:
        (cache / name).touch()  # used: among the last to be pruned
    return kept


def prune(cache: Path, most: int = 100) -> None:
    """Drops the files that were not used for longest, half-written ones too."""
    with contextlib.suppress(FileNotFoundError):  # another build prunes too
        by_use = sorted(cache.iterdir(), key=lambda file: file.stat().st_mtime)
        for file in by_use[:-most]:
            file.unlink()


def execute(script: Path) -> Run:
    """Runs a script in a process of its own, where a warning is an error."""
    with tempfile.TemporaryDirectory() as name:
        log, errors = Path(name) / "log", Path(name) / "errors"
        options = {"log": log, "errors": errors, "strict": True}
        done = scripts.started(script, "--output", name, **options)
        done.join()
        said = errors.read_text()
        if done.exitcode or "Warning" in said:
            raise RuntimeError(f"{script.name} failed:\n{said}")
        picture = (Path(name) / f"{script.stem}.png").read_bytes()
        return Run(log.read_text(), picture)


def write(entry: Path, kept: Run) -> None:
    """Writes a file that is whole as soon as it has its name."""
    content = kept.printed.encode() + b"\0" + kept.picture
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=entry.parent, delete=False) as file:
        file.write(hashlib.sha256(content).digest() + content)
    os.replace(file.name, entry)


def read(entry: Path) -> Run | None:
    """Returns what a file holds; None if there is no such file, or it is damaged."""
    try:
        file = entry.read_bytes()
    except FileNotFoundError:
        return None
    checksum, content = file[:32], file[32:]
    if hashlib.sha256(content).digest() != checksum:
        return None
    printed, _, picture = content.partition(b"\0")
    return Run(printed.decode(), picture)


def name_of(script: Path, package: Path) -> str:
    """A name that changes with all that a script's run depends on.

    That is its code, the code of a package and of the scripts beside it that it
    imports, each other file of its folder, and the environment.
    """
    modules = sorted(package.rglob("*.py"))
    data = [
        path
        for path in sorted(script.parent.rglob("*"))
        if path.is_file() and path.suffix not in (".py", ".pyc")
    ]
    depends = (
        environment(),
        [(path.relative_to(package), code(path.read_bytes())) for path in modules],
        [(path.name, code(path.read_bytes())) for path in imported(script)],
        [(path.relative_to(script.parent), path.read_bytes()) for path in data],
    )
    return f"{script.stem}-{hashlib.sha256(repr(depends).encode()).hexdigest()[:32]}"


def imported(script: Path) -> list[Path]:
    """A script and the scripts beside it that it imports, directly or not."""
    beside, found = {path.stem: path for path in script.parent.glob("*.py")}, [script]
    for path in found:  # which grows
        for node in ast.walk(ast.parse(path.read_bytes())):
            match node:
                case ast.Import(names=aliases):
                    names = [alias.name for alias in aliases]
                case ast.ImportFrom(module=str(module)):
                    names = [module]
                case _:
                    continue
            more = [beside[name] for name in names if name in beside]
            found += [other for other in more if other not in found]
    return found


@functools.cache
def code(source: bytes) -> str:
    """The syntax tree of a file: no comments, no layout, and here no docstrings.

    Prose is free to change.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        match node:
            case (
                ast.Module(body=[ast.Expr(ast.Constant(str())), *rest])
                | ast.ClassDef(body=[ast.Expr(ast.Constant(str())), *rest])
                | ast.FunctionDef(body=[ast.Expr(ast.Constant(str())), *rest])
            ):
                node.body = rest
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


@functools.cache
def environment() -> tuple[object, ...]:
    """What is installed, on what, and the settings of what computes.

    All that is installed, so that a package which an example needs and the project no
    longer asks for is not hidden by a run that had it.
    """
    settings = ("EQX_", "JAX_", "XLA_")
    return (
        [code(Path(file).read_bytes()) for file in (__file__, scripts.__file__)],
        (sys.version, sys.platform, platform.machine()),
        sorted({f"{found.name} {found.version}" for found in distributions()}),
        sorted(pair for pair in os.environ.items() if pair[0].startswith(settings)),
    )


def installed(package: str) -> Path:
    """The folder of the package that a script would import."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed.")
    return Path(spec.origin).parent
