"""Runs the study's cells, one process per core, and sums them up."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

from benchmarks.record import ROOT, target, write_record
from benchmarks.study.cells import RECORD, read_cells
from benchmarks.study.claims import claims
from benchmarks.study.grid import Cell
from benchmarks.study.rows import best_trade, copies, pick, rows


def work(cell: Cell, data: Path, folder: Path, results: Path) -> str:
    """One cell in a worker; its output goes to a log of its own. Returns what went wrong, or nothing."""
    import torch  # here and below: only a worker needs it

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


def run_cells(
    todo: Sequence[Cell], work_dir: Path, results_dir: Path, processes: int, time_limit: float | None = None
) -> list[str]:
    """Run the cells, ``processes`` at a time, and begin none after ``time_limit`` minutes; what failed, a line each."""
    started, failed, done, queue, running = time.monotonic(), [], 0, list(todo), {}
    # One thread each; forked workers would inherit torch's own.
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", ACCELERATE_USE_CPU="true")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        while queue or running:
            late = time_limit is not None and time.monotonic() - started > 60 * time_limit
            while queue and len(running) < processes and not late:
                cell = queue.pop(0)
                running[pool.submit(work, cell, work_dir / "data", work_dir, results_dir)] = cell
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


def prepare(archive: Path, folder: Path) -> None:
    """The study's pictures, once."""
    from benchmarks.study.data import write_sets  # with torch, which summing up needn't import

    done = folder / "sets.json"
    if not done.exists():
        sets = write_sets(archive, ROOT / "miniature/data/pretrain", folder)
        done.write_text(json.dumps(sets))


# -- summing up ----------------------------------------------------------------------


def summarise(folder: Path, record: Path = RECORD) -> dict:
    """Write study.json from the cells: rows, claims, and what was aimed at."""
    started, cells = time.perf_counter(), read_cells(folder)
    table, targets = rows(cells), []
    for size in sorted({row["size"] for row in table}):
        clean, best = pick(table, "clean", size, sampler="full"), best_trade(table, size)
        if clean and best and copies(clean):
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
