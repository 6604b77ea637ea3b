"""What is made while the site is built: the home page, a page per example, formulas.

An example's page is the script itself: its docstring as text, its picture, what it
printed, its code. The script is run for it, so a broken example breaks the build.
Formulas become MathML, which browsers draw without a script from elsewhere.
"""

import ast
import html
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages and pictures to the site."""
    home = re.sub(r'(\]\(|src=")docs/', r"\1", (ROOT / "README.md").read_text("utf-8"))
    # Two at a time, each in a process of its own; what they make is remembered.
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda path: render(path, path.read_text("utf-8")), EXAMPLES))
    for script in EXAMPLES:
        home = home.replace(
            f"](examples/{script.name})", f"](examples/{script.stem}.md)"
        )
        text, picture = render(script, script.read_text(encoding="utf-8"))
        page = f"examples/{script.stem}"
        files.append(File.generated(config, f"{page}.md", content=text))
        files.append(File.generated(config, f"{page}.png", content=picture))
    files.append(File.generated(config, "index.md", content=home))
    for name in ("CHANGELOG.md", "LICENSE"):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_content(
    content: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Turns the formulas of a page from LaTeX into MathML."""
    return FORMULA.sub(mathml, content)


def mathml(formula: re.Match[str]) -> str:
    """One formula, in the line or on a line of its own."""
    display = "inline" if formula[2] == "(" else "block"
    return convert(html.unescape(formula[3]), display=display)


@cache
def render(script: Path, source: str) -> tuple[str, bytes]:
    """Runs an example; returns its page, in Markdown, and its picture."""
    title, _, story = (ast.get_docstring(ast.parse(source)) or "").partition("\n")
    code = source.split('"""', 2)[2].strip()
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(
            [sys.executable, "-W", "error", script, "--output", folder],
            capture_output=True,
            check=False,
            text=True,
            env={**os.environ, "MPLBACKEND": "Agg"},
        )
        if run.returncode or "Warning" in run.stderr:
            raise RuntimeError(f"{script.name} failed:\n{run.stderr}")
        picture = (Path(folder) / f"{script.stem}.png").read_bytes()
    printed = run.stdout.rstrip()
    if not printed.startswith("|"):  # a table stands as one
        printed = f"```text\n{printed}\n```"
    page = f"""# {title.rstrip(".")}

{story.strip()}

![What the script draws]({script.stem}.png)

It prints:

{printed}

The script, `examples/{script.name}`:

```python
{code}
```
"""
    return page, picture
