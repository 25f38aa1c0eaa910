"""Does the study come out alike when it is run again, on another machine or with other draws of the noise?

    python -m benchmarks.study --archive … --results_dir AGAIN      the reduced grid anew, into a folder of its own
    python -m benchmarks.study.again AGAIN                          compare with the committed cells, row by row

Every row's excess, best attack and Fréchet distance: the difference of the two means with Welch's 95 % interval over seeds.
Runs that differ by chance alone have 0 in about 95 of 100 such intervals (methods without stored noise repeat exactly on one
kind of machine: its seeds are fixed).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from benchmarks.record import ROOT, target, write_record
from benchmarks.study.cells import CELLS, read_cells
from benchmarks.study.intervals import CONFIDENCE, plain
from benchmarks.study.rows import rows
from eval.statistics.calibrate import Estimate

RECORD = ROOT / "benchmarks/results/study_again.json"
FIGURES = {"excess": "worst_by_seed", "auc": "auc_by_seed", "fd": "fd_by_seed"}
KEY = ("method", "t_n", "size", "steps", "sampler")


def difference(one: Sequence[float], other: Sequence[float]) -> Estimate:
    """mean(other) − mean(one) with Welch's interval; without width where neither scatters."""
    value = float(np.mean(other) - np.mean(one))
    if np.ptp(one) == 0 == np.ptp(other):
        return Estimate(value, value, value)
    found = stats.ttest_ind(other, one, equal_var=False).confidence_interval(CONFIDENCE)
    return Estimate(value, float(found.low), float(found.high))


def compare(first: Sequence[dict], again: Sequence[dict]) -> list[dict]:
    """One entry per row that both runs have with two seeds or more, over the seeds that both have."""
    seeds = [{_name(c): c for c in cells} for cells in (first, again)]
    common = seeds[0].keys() & seeds[1].keys()
    tables = [rows([by_name[n] for n in sorted(common)]) for by_name in seeds]
    made = []
    for one, other in zip(*tables, strict=True):
        if len(one["seeds"]) > 1:
            found = {name: _judged(one[key], other[key]) for name, key in FIGURES.items()}
            made.append({**{k: one[k] for k in KEY}, "seeds": one["seeds"], **found})
    return made


def _name(cell: dict) -> tuple:
    return tuple(str(cell["cell"][k]) for k in ("method", "t_n", "size", "seed"))


def _judged(one: Sequence[float], other: Sequence[float]) -> dict:
    found = difference(one, other)
    return {
        "first": float(np.mean(one)),
        "again": float(np.mean(other)),
        "difference": plain(found),
        "identical": list(one) == list(other),
        "agrees": found.low <= 0 <= found.high,
    }


def totals(table: Sequence[dict]) -> dict:
    """Of a model's rows by several samplers the excess and the attacks are the same figures, and count once."""
    once = {}
    for row in table:
        for name in FIGURES:
            model = tuple(row[k] for k in KEY[: 5 if name == "fd" else 4])
            once[(name, *model)] = row[name]
    other = [one for one in once.values() if not one["identical"]]
    return {
        "figures": len(once),
        "identical": len(once) - len(other),
        "others": len(other),
        "others_agree": sum(one["agrees"] for one in other),
        "disagree": [" ".join(map(str, name)) for name, one in once.items() if not one["agrees"]],
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path, help="folder of the second run's cells")
    args = parser.parse_args(argv)
    started, table = time.perf_counter(), compare(read_cells(CELLS), read_cells(args.cells))
    if not table:
        parser.error(f"cells: {str(args.cells)!r} has no row of two seeds that the committed cells have too")
    found = totals(table)
    share = found["others_agree"] / found["others"] if found["others"] else 1.0
    targets = [target("study_again", share, ">=", 0.9)]
    write_record(RECORD, "study_again", {**found, "rows": table}, targets, started, module="benchmarks.study.again")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
