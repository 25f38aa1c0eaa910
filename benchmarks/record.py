"""The JSON that every benchmark writes: what was run, where, for how long, what came out, and what was aimed at."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from sdxl_ambient.provenance import cpu_name, environment, write_json

ROOT = Path(__file__).resolve().parent.parent


def target(name: str, value: float, sense: str, limit: float) -> dict:
    """A figure that is aimed at; ``sense`` is "<=" or ">=". A miss is reported, it is no error."""
    return {"name": name, "value": value, "sense": sense, "limit": limit}


def met(one: dict) -> bool:
    """Whether a target's value is within its limit."""
    return one["value"] <= one["limit"] if one["sense"] == "<=" else one["value"] >= one["limit"]


def environment_of_run() -> dict:
    """Versions, processor or GPU, threads and commit."""
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {**environment(), "processor": cpu_name(), "gpu": gpu, "threads": torch.get_num_threads(), "commit": commit}


def write_record(
    path: Path, benchmark: str, figures: dict, targets: list[dict], started: float, module: str | None = None
) -> dict:
    """Write and return the record.

    Args:
        started: time.perf_counter() at the start.
        module: the command, where it is another than benchmarks.BENCHMARK.
    """
    record = {
        "benchmark": benchmark,
        "command": " ".join(["python", "-m", module or f"benchmarks.{benchmark}", *sys.argv[1:]]),
        "environment": environment_of_run(),
        "seconds": time.perf_counter() - started,
        "figures": figures,
        "targets": targets,
    }
    write_json(path, record)
    for one in targets:
        verdict = "met" if met(one) else "MISSED"
        print(f"{one['name']}: {one['value']:.3f} {one['sense']} {one['limit']} {verdict}")
    return record
