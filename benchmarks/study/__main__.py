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
import json
import multiprocessing
import os
import re
import sys
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

from benchmarks.record import ROOT, target, write_record
from benchmarks.study.cells import CELLS, RECORD, read_cells
from benchmarks.study.grid import GRIDS, Cell


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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


# -- running -------------------------------------------------------------------------


def work(cell: Cell, data: Path, folder: Path, results: Path) -> str:
    """One cell in a worker; its output goes to a log of its own. Returns what went wrong, or nothing."""
    import torch

    from benchmarks.study.cell import Folders, run

    torch.set_num_threads(1)
    log = folder / "logs" / f"{cell.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        try:
            run(cell, Folders(data, folder, results))
        except Exception as error:  # one cell's failure is reported, and the others go on
            traceback.print_exc()
            return f"{type(error).__name__}: {' '.join(str(error).split())} ({log})"
    return ""


def run_cells(todo: list[Cell], args) -> list[str]:
    """Run the cells, ``args.processes`` at a time; returns what failed, a line each."""
    started, failed, done, queue, running = time.monotonic(), [], 0, list(todo), {}
    # One thread each; forked workers would inherit torch's own.
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", ACCELERATE_USE_CPU="true")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=context) as pool:
        while queue or running:
            late = args.time_limit is not None and time.monotonic() - started > 60 * args.time_limit
            while queue and len(running) < args.processes and not late:
                cell = queue.pop(0)
                running[pool.submit(work, cell, args.work_dir / "data", args.work_dir, args.results_dir)] = cell
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell, wrong = running.pop(future), future.result()
                failed += [f"{cell.name}: {wrong}"] if wrong else []
                done += 1
                minutes = (time.monotonic() - started) / 60
                rate = done / minutes
                print(
                    f"{done}/{len(todo)} {cell.name} {'FAILED ' if wrong else ''}after {minutes:.1f} min, "
                    f"{rate:.2f} cells/min, {len(queue) / rate:.0f} min to go",
                    flush=True,
                )
    return failed


def prepare(args) -> None:
    """The study's pictures, once."""
    from benchmarks.study.data import write_sets

    done = args.work_dir / "data" / "sets.json"
    if not done.exists():
        sets = write_sets(args.archive, ROOT / "miniature/data/pretrain", args.work_dir / "data")
        done.write_text(json.dumps(sets))


# -- summing up ----------------------------------------------------------------------


def summarise(folder: Path, record: Path = RECORD) -> dict:
    """Write study.json from the cells: rows, claims, and what was aimed at."""
    from benchmarks.study.summary import best_trade, claims, copies, pick, rows

    started, cells = time.perf_counter(), read_cells(folder)
    table, targets = rows(cells), []
    for size in sorted({row["size"] for row in table}):
        clean, best = pick(table, "clean", size, sampler="full"), best_trade(table, size)
        if best and copies(clean):
            cut = 1 - best["worst_excess"]["value"] / clean["worst_excess"]["value"]
            targets.append(target(f"study_excess_cut_{size}", cut, ">=", 0.8))
            targets.append(target(f"study_fd_ratio_{size}", best["fd"]["value"] / clean["fd"]["value"], "<=", 1.1))
    figures = {
        "cells": len(cells),
        "cpu_hours": sum(cell["cost"]["cpu_seconds"] for cell in cells) / 3600,
        "thresholds": {cell["cell"]["size"]: cell["threshold"]["value"] for cell in cells},
        "fd_train_to_heldout": {c["cell"]["size"]: c["controls"]["fd_pixels_train_to_heldout"] for c in cells},
        "rows": table,
        "claims": claims(table),
    }
    return write_record(record, "study", figures, targets, started)


def main(argv=None) -> int:
    args = parse_args(argv)
    failed = []
    if not args.summarise:
        args.results_dir.mkdir(parents=True, exist_ok=True)
        prepare(args)
        chosen = [cell for cell in GRIDS[args.grid] if re.search(args.only, cell.name)]
        todo = [cell for cell in chosen if not (args.results_dir / f"{cell.name}.json").exists()]
        print(f"{len(chosen)} cells, {len(chosen) - len(todo)} of them done", flush=True)
        failed = run_cells(todo, args)
    if any(args.results_dir.glob("*.json")):
        from benchmarks.study.pages import write_pages

        write_pages(summarise(args.results_dir))
    for line in failed:
        print(f"benchmarks.study: error: {line}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
