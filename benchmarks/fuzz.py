"""Everything that is read of a store, a checkpoint, a LoRA or a report, fuzzed with the coverage of its own code as a guide.

    pip install atheris
    python -m benchmarks.fuzz --json benchmarks/results/fuzz.json --minutes 30

Each reader gets the bytes of a real artefact, mutated by libFuzzer. It may read them or raise UserError. Every other
exception, 2 seconds for one input and 2 GiB are failures. A JSON object is sealed again after it was mutated, to reach
what the seal would have refused.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, target, write_record

TARGETS = ("plan", "manifest", "checkpoint", "adapter", "metadata", "record")
SEALED = ("plan", "manifest", "checkpoint")
MOST_SECONDS, MOST_MEMORY = 2, 2048  # of one input; MiB
Reader = Callable[[Path], Any]


def readers() -> dict[str, tuple[str, Reader]]:
    """What each target reads: the file's name in its folder, and the reader of the folder."""
    from sdxl_ambient.formats.read import read_adapter
    from sdxl_ambient.formats.record import lora_metadata, read_training_info
    from sdxl_ambient.store.validate import read_manifest, read_plan
    from sdxl_ambient.training.checkpoint import recorded

    config = json.loads((ROOT / "miniature/pipeline/unet/config.json").read_text())
    lora = "pytorch_lora_weights.safetensors"
    return {
        "plan": ("plan.json", read_plan),
        "manifest": ("manifest.json", read_manifest),
        "checkpoint": ("checkpoint.json", recorded),
        "adapter": (lora, lambda folder: read_adapter(folder / lora, config)),
        "metadata": (lora, lambda folder: lora_metadata(folder / lora)),
        "record": ("training.json", read_training_info),
    }


def sealed(data: bytes) -> bytes:
    """A JSON object with the checksum of its content; other bytes as they are."""
    from sdxl_ambient.provenance import CHECKSUM, hash_json

    try:
        value = json.loads(data)
        if isinstance(value, dict):
            value[CHECKSUM] = hash_json({name: one for name, one in value.items() if name != CHECKSUM})
            return json.dumps(value).encode()
    except (ValueError, RecursionError):
        pass
    return data


def fuzz(name: str, folder: Path, flags: list[str]) -> None:
    """Fuzz one target in this process, until libFuzzer ends it."""
    atheris = importlib.import_module("atheris")  # no package of ours: pip install atheris
    for module in [m for m in sys.modules if m.startswith("sdxl_ambient")]:  # imported without counting, for the record
        del sys.modules[module]
    with atheris.instrument_imports(include=["sdxl_ambient"]):
        file, read = readers()[name]
    from sdxl_ambient.errors import UserError

    def one_input(data: bytes) -> None:
        content = sealed(data) if name in SEALED else data
        (folder / file).write_bytes(content)
        if name == "manifest":  # its plan says the same, so that the manifest's own checks are reached
            (folder / "plan.json").write_bytes(content)
        try:
            read(folder)
        except UserError:
            pass

    atheris.Setup([sys.argv[0], *flags], one_input)
    atheris.Fuzz()


def artefacts(folder: Path) -> dict[str, Path]:
    """A real file for each target, of one step of training on six emoji."""
    from benchmarks.faults.commands import BASE, PICTURES, copy_pictures

    copy_pictures(folder / "images", 0, PICTURES)
    options = dict(
        pretrained_model_name_or_path=BASE, train_data_dir=folder / "images", output_dir=folder / "out", resolution=64,
        rank=1, train_batch_size=2, max_train_steps=1, checkpointing_steps=1, report_to="none", noise_key="none",
    )  # fmt: skip
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    environment = {**os.environ, "SDXL_AMBIENT_HOME": str(folder / "home")}
    subprocess.run([sys.executable, ROOT / "train_sdxl_ambient.py", *words], check=True, cwd=ROOT, env=environment)
    out, state = folder / "out", folder / "out/checkpoint-1"
    lora = out / "pytorch_lora_weights.safetensors"
    return {
        "plan": out / "latents/plan.json",
        "manifest": out / "latents/manifest.json",
        "checkpoint": state / "checkpoint.json",
        "adapter": lora,
        "metadata": lora,
        "record": out / "training.json",
    }


def run(name: str, artefact: Path, work: Path, seconds: float) -> dict[str, Any]:
    """Fuzz one target in a process of its own, again after each failure, until its time is over."""
    corpus, found = work / "corpus", work / "found"
    for folder in (corpus, found, work / "folder"):
        folder.mkdir(parents=True)
    (corpus / "real").write_bytes(artefact.read_bytes())
    until, figures = time.monotonic() + seconds, {"inputs": 0, "edges": 0, "failures": []}
    while (left := int(until - time.monotonic())) > 0 and len(figures["failures"]) < 10:
        flags = [
            f"-max_total_time={left}",
            f"-timeout={MOST_SECONDS}",
            f"-rss_limit_mb={MOST_MEMORY}",
            "-print_final_stats=1",
        ]
        flags += [f"-artifact_prefix={found}/", f"-max_len={2 * artefact.stat().st_size}", str(corpus)]
        words = [sys.executable, "-m", "benchmarks.fuzz", "--one", name, "--folder", str(work / "folder"), "--", *flags]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, errors="replace")
        units = re.findall(r"number_of_executed_units:\s*(\d+)", done.stderr)
        figures["inputs"] += int(units[-1]) if units else 0
        figures["edges"] = max([figures["edges"], *map(int, re.findall(r"cov: (\d+)", done.stderr))])
        if done.returncode:
            figures["failures"].append({"exit": done.returncode, "end": done.stderr[-1500:]})
            print(f"{name}: {done.stderr[-3000:]}", flush=True)
    figures["files"] = sorted(p.name for p in found.iterdir())
    return figures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--minutes", type=float, default=30, help="of all targets together")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--one", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        fuzz(options.one, options.folder, options.flags)
        return 0
    if options.json is None:
        parser.error("--json is missing")
    started, figures = time.perf_counter(), {}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        real = artefacts(Path(name))
        for one in options.targets:
            figures[one] = run(one, real[one], Path(name) / one, 60 * options.minutes / len(options.targets))
            print(f"{one}: {figures[one]['inputs']} inputs, {figures[one]['edges']} edges", flush=True)
    failures = sum(len(one["failures"]) for one in figures.values())
    targets = [
        target("fuzz_failures", failures, "<=", 0),
        target("fuzz_minutes", (time.perf_counter() - started) / 60, ">=", 30),
    ]
    write_record(options.json, "fuzz", figures, targets, started)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
