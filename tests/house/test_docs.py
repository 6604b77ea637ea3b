"""Every public name is documented once, and every code block of the prose runs."""

import re
from types import ModuleType

import pytest

import scripts
import vernal
import vernal.likelihoods
import vernal.plot
from pages import PAGES, ROOT, python_of

PUBLIC = sorted(
    name
    for name, value in vars(vernal).items()
    if not name.startswith("_") and not isinstance(value, ModuleType)
)
MODULES = {"likelihoods": vernal.likelihoods, "plot": vernal.plot}
IN_MODULES = sorted(
    f"{module}.{name}"
    for module, found in MODULES.items()
    for name, value in vars(found).items()
    if not name.startswith("_")
    and getattr(value, "__module__", "").startswith(("vernal._like", "vernal.plot"))
)
OUTPUT = re.compile(r"^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_every_public_name_is_documented_once():
    documented = [
        name
        for page in (ROOT / "docs" / "api").glob("*.md")
        for name in re.findall(r"^::: vernal\.(.+)$", page.read_text(), re.MULTILINE)
    ]
    assert sorted(documented) == sorted([*PUBLIC, *IN_MODULES])


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_docstring(name):
    assert (getattr(vernal, name).__doc__ or "").strip()


@pytest.mark.parametrize("name", IN_MODULES)
def test_name_of_a_public_module_has_a_docstring(name):
    module, name = name.split(".")
    assert (getattr(MODULES[module], name).__doc__ or "").strip()


CODE_BLOCKS = [
    page for page in PAGES if "```python" in page.read_text(encoding="utf-8")
]


@pytest.mark.parametrize(
    "page", CODE_BLOCKS, ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_code_blocks_run_and_print_what_is_shown(page, tmp_path):
    script, text = tmp_path / "blocks.py", page.read_text(encoding="utf-8")
    # On the line of the title, so that the others stay where they are.
    first = f"import os, warnings; os.chdir({str(tmp_path)!r}); "
    first += "warnings.simplefilter('error')"
    script.write_text(first + python_of(text), encoding="utf-8")
    run = scripts.started(script, log=tmp_path / "log")
    run.join()
    printed = (tmp_path / "log").read_text()
    assert run.exitcode == 0, printed
    for shown in OUTPUT.findall(text):
        assert shown in printed
