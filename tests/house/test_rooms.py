"""Folders are imported through their faces, and private names stay in their files.

That no folder imports from a higher floor, `nox -s lint` checks: the floors are in
`pyproject.toml`.
"""

import ast
import functools
import itertools
import tomllib
from pathlib import Path

import pytest

import vernal

SOURCE = Path(vernal.__file__).parent
ROOT = Path(__file__).parents[2]
FILES = sorted(SOURCE.rglob("*.py"))
FOLDERS = {path.parent.name for path in SOURCE.glob("_*/__init__.py")}
MODULES = {path.stem for path in SOURCE.glob("*.py")} - {"__init__"}


@functools.cache
def imports(path: Path) -> list[ast.ImportFrom]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("vernal") for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level or not (node.module or "").startswith("vernal")
            if node.level:
                found.append(node)
    return found


@pytest.mark.parametrize(
    "path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix()
)
def test_a_folder_is_imported_through_its_face(path):
    is_in_folder = path.parent != SOURCE
    for node in imports(path):
        names = [alias.name for alias in node.names]
        if node.module is None:
            assert path == SOURCE / "__init__.py"
            assert MODULES.issuperset(names)
        elif node.level == 1 + is_in_folder:
            assert node.module in FOLDERS, f"{path}: {node.module}"
            assert node.module != path.parent.name, f"{path} imports its own face"
        else:
            assert is_in_folder
            assert node.level == 1
            assert (path.parent / f"{node.module}.py").exists(), node.module
        assert not any(name.startswith("_") for name in names), names


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_a_face_has_what_other_folders_import_and_no_more(folder):
    face = SOURCE / folder / "__init__.py"
    offered = {alias.name for node in imports(face) for alias in node.names}
    wanted = {
        alias.name
        for path in FILES
        if path.parent.name != folder
        for node in imports(path)
        if node.module == folder
        for alias in node.names
    }
    assert offered == wanted


def test_every_folder_is_on_a_floor_and_in_the_docs():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = settings["tool"]["importlinter"]["contracts"]
    floors = [floor.split(" : ") for floor in contract["layers"]]
    named = list(itertools.chain.from_iterable(floors))
    assert set(named) == FOLDERS | MODULES
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [line.split("`")[1::2] for line in page.splitlines() if line[:3] == "| `"]
    assert [row[0].rstrip("/") for row in rows] == named
