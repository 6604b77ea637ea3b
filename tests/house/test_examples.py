"""Every example runs without a warning and leaves its picture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_example(script, tmp_path):
    run = subprocess.run(
        [sys.executable, "-W", "error", script],
        capture_output=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg"},
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stderr
    assert run.stdout.strip()
    picture = tmp_path / "output" / f"{script.stem}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
