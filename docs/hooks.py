"""What is made while the site is built: the home page, a page per example, formulas.

An example's page is the script itself: its docstring as text, its picture, what it
printed, its code. The script is run for it, so a broken example breaks the build. What
it does is kept in `.cache/examples` until its code, or what it uses, has changed.
Formulas become MathML, which browsers draw without a script from elsewhere.
"""

import ast
import html
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import cached_runs

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "examples"
FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL
)


def on_startup(**_: object) -> None:
    """Lets the processes of the examples find what begins them."""
    sys.path.append(str(ROOT / "docs"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages and pictures to the site."""
    home, contributing = (
        re.sub(r'(\]\(|src=")docs/', r"\1", (ROOT / name).read_text("utf-8"))
        for name in ("README.md", "CONTRIBUTING.md")
    )
    vernal = cached_runs.installed("vernal")
    scripts = sorted((ROOT / "examples").glob("*.py"))
    # Each script is a process of its own, of up to a gigabyte.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        runs = pool.map(lambda path: cached_runs.run(path, vernal, CACHE), scripts)
        made = list(zip(scripts, runs, strict=True))
    cached_runs.prune(CACHE)
    for script, run in made:
        home = home.replace(
            f"](examples/{script.name})", f"](examples/{script.stem}.md)"
        )
        page, text = f"examples/{script.stem}", page_of(script, run)
        files.append(File.generated(config, f"{page}.md", content=text))
        files.append(File.generated(config, f"{page}.png", content=run.picture))
    files.append(File.generated(config, "index.md", content=home))
    files.append(File.generated(config, "CONTRIBUTING.md", content=contributing))
    for name in ("CHANGELOG.md", "LICENSE"):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_content(
    content: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Turns the formulas of a page from LaTeX into MathML."""
    if "doc-module" in content:  # what it has is private
        raise RuntimeError(f"{page.file.src_path} documents a file, not a public name.")
    return FORMULA.sub(mathml, content)


def mathml(formula: re.Match[str]) -> str:
    """One formula, in the line or on a line of its own."""
    display = "inline" if formula[2] == "(" else "block"
    return convert(html.unescape(formula[3]), display=display)


def page_of(script: Path, run: cached_runs.Run) -> str:
    """The page of an example, in Markdown."""
    source = script.read_text(encoding="utf-8")
    title, _, story = (ast.get_docstring(ast.parse(source)) or "").partition("\n")
    code = source.split('"""', 2)[2].strip()
    printed = run.printed.rstrip()
    if not printed.startswith("|"):  # a table stands as one
        printed = f"```text\n{printed}\n```"
    return f"""# {title.rstrip(".")}

{story.strip()}

![What the script draws]({script.stem}.png)

It prints:

{printed}

The script, `examples/{script.name}`:

```python
{code}
```
"""
