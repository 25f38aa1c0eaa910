"""The cells that were run, a JSON file each, and the study's record."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.record import ROOT

CELLS = ROOT / "benchmarks/results/study"
RECORD = ROOT / "benchmarks/results/study.json"


def read_cells(folder: Path) -> list[dict]:
    """All cells of a folder, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
