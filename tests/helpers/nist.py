"""NIST's reference data, and their curves, as the example fits them."""

import json
import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"

CURVES = runpy.run_path(str(EXAMPLES / "nist.py"))["FORMULAS"]

# By name: `x`, `y`, two `starts`, and the `certified` answer.
DATA = json.loads((EXAMPLES / "data" / "nist.json").read_text(encoding="utf-8"))
