"""Faults in every command, and whether anything is observed twice, corrupted in silence, lost, or run.

    python -m benchmarks.faults --json benchmarks/results/faults.json
    python -m benchmarks.faults --json OUT --only "encode|SIGKILL at a write|17"

Each fault: a command is run with it, then run again undisturbed, and what is left is compared bitwise with that of a run
that nothing happened to. Every noisy latent found anywhere, also in hidden and temporary files, is compared with the first.
A read-only folder and a small disk are mounted, which takes root; else they are counted as skipped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import tempfile
import time
from pathlib import Path

from benchmarks.faults.campaign import COUNTS, FAULTS, WEIGHTS, Campaign, Result, prepare, summary
from benchmarks.faults.child import preload
from benchmarks.faults.commands import all_commands
from benchmarks.record import target, write_record


def plan(count: int, seed: int) -> list[tuple[str, str, int]]:
    """Command, fault and seed of each."""
    chance, names = random.Random(seed), [c.name for c in all_commands()]
    share = [4 if name.startswith("encode") else 1 for name in names]
    pick = [(chance.choices(names, share)[0], chance.choices(FAULTS, WEIGHTS)[0]) for _ in range(count)]
    return [(command, fault, seed * 1_000_000 + k) for k, (command, fault) in enumerate(pick)]


def work(cases: list[tuple[str, str, int]], folder: Path, prepared: Path, until: float, file: Path) -> None:
    """One worker's faults; their results into a file of its own, after each."""
    commands, results = {c.name: c for c in all_commands()}, list[Result]()
    campaign = Campaign(folder, prepared)
    for command, fault, seed in cases:
        if time.monotonic() > until:
            break
        one = campaign.inject(commands[command], fault, seed)
        results.append(one)
        if one.problems:
            print(f"{command}|{fault}|{seed}: {one.problems}", flush=True)
        file.write_text(json.dumps([dataclasses.asdict(r) for r in results]))
        if len(results) % 25 == 0:
            print(f"worker {folder.name}: {len(results)} of {len(cases)}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--faults", type=int, default=1100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=600, help="stop after so many, whatever is left")
    parser.add_argument("--quick", action="store_true", help="40 faults")
    parser.add_argument("--only", action="append", metavar="COMMAND|FAULT|SEED", help="these cases alone")
    options = parser.parse_args(argv)
    started = time.perf_counter()
    cases = plan(40 if options.quick else options.faults, options.seed)
    if options.only:
        chosen = [case.split("|") for case in options.only]
        cases, options.workers = [(command, fault, int(seed)) for command, fault, seed in chosen], 1
    preload()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        prepare(folder / "prepared", {c.name: c for c in all_commands()})
        until = time.monotonic() + 60 * options.minutes
        processes = []
        for k in range(options.workers):
            child = os.fork()
            if not child:
                work(cases[k :: options.workers], folder / f"{k}", folder / "prepared", until, folder / f"results-{k}")
                os._exit(0)
            processes.append(child)
        for child in processes:
            os.waitpid(child, 0)
        files = [folder / f"results-{k}" for k in range(options.workers)]
        results = [Result(**one) for file in files if file.exists() for one in json.loads(file.read_text())]
        shutil.rmtree(folder, ignore_errors=True)
    figures = summary(results)
    targets = [target("faults_injected", figures["faults_injected"], ">=", 1000)]
    targets += [target(name, figures[name], "<=", 0) for name in COUNTS]
    write_record(options.json, "faults", figures, targets, started)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
