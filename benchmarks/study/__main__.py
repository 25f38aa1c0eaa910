"""Does ambient fine-tuning reduce memorisation, at what cost in quality, and which of the family does best?

    npm pack emoji-datasource-twitter@16.0.0
    python -m benchmarks.study --archive emoji-datasource-twitter-16.0.0.tgz     the reduced grid
    python -m benchmarks.study --archive … --grid full --time_limit 120          as far as two hours go
    python -m benchmarks.study --summarise                                       study.json, tables and figures anew

Every cell (a method, its noise level, a number of images, a seed) is trained by the training script and measured by the
evaluation, one process per core, and leaves one JSON in benchmarks/results/study/. A cell that is there is not run again, an
interrupted one goes on from its last checkpoint. From the cells follow benchmarks/results/study.json, the tables of
docs/STUDY.md and README.md, and the figures.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from benchmarks.record import ROOT
from benchmarks.study.cells import CELLS
from benchmarks.study.grid import GRIDS
from benchmarks.study.run import prepare, run_cells, summarise


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archive", type=Path, help="the npm archive of emoji-datasource-twitter 16.0.0")
    parser.add_argument("--grid", choices=tuple(GRIDS), default="reduced", help="which cells")
    parser.add_argument("--only", default="", help="a regular expression that a cell's name must contain")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="cells at a time, one thread each")
    parser.add_argument("--time_limit", type=float, help="minutes after which no cell is begun")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs/study", help="for pictures, adapters and stores")
    parser.add_argument("--results_dir", type=Path, default=CELLS, help="for one JSON per cell")
    parser.add_argument("--summarise", action="store_true", help="run nothing; write study.json, tables and figures")
    args = parser.parse_args(argv)
    if not args.summarise and not (args.archive and args.archive.is_file()):
        parser.error(f"--archive: {str(args.archive)!r} is not a file; npm pack emoji-datasource-twitter@16.0.0 makes it")
    if args.processes < 1:
        parser.error(f"--processes: {args.processes} is not at least 1")
    try:
        re.compile(args.only)
    except re.error as error:
        parser.error(f"--only: {args.only!r} is no regular expression: {error}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    failed = []
    if not args.summarise:
        args.results_dir.mkdir(parents=True, exist_ok=True)
        prepare(args.archive, args.work_dir / "data")
        chosen = [cell for cell in GRIDS[args.grid] if re.search(args.only, cell.name)]
        todo = [cell for cell in chosen if not (args.results_dir / f"{cell.name}.json").exists()]
        print(f"{len(chosen)} cells, {len(chosen) - len(todo)} of them done", flush=True)
        failed = run_cells(todo, args.work_dir, args.results_dir, args.processes, args.time_limit)
    if any(args.results_dir.glob("*.json")):
        from benchmarks.study.pages import write_pages  # takes matplotlib

        write_pages(summarise(args.results_dir))
    for line in failed:
        print(f"benchmarks.study: error: {line}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
