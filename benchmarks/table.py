"""README's table of measured claims, from the committed results.

python -m benchmarks.table            print it
python -m benchmarks.table --write    put it into README.md, between its two marks
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.marks import put_between
from benchmarks.record import ROOT, met

RESULTS = ROOT / "benchmarks/results"
START, END = "<!-- measured: python -m benchmarks.table --write -->", "<!-- /measured -->"
WHAT = {
    "warm_cache_speedup": "seconds of the embedding stage, cold / with a warm cache, DINOv2 ViT-L/14's size, 200 images",
    "peak_gib_read_1m": "peak memory in GiB of reading a million × 1024 embeddings from the cache",
    "interval_coverage": "how often the interval of the copied share covers the truth, at the worst of four shares",
    "false_alarm_rate": "how often a generator that copies nothing is accused",
    "excess_below_tn_over_official": "error below t_n beyond the unavoidable, ours / official estimator at its best weight",
    "swd_full_over_clean_tn100": "sliced Wasserstein distance of samples, ours at t_n = 100 / trained on clean data",
    "excess_high_t_over_clean": "error beyond the unavoidable at high t, ours − trained on clean data",
    "naive_over_worst_ambient": "error beyond the unavoidable at t_n, noisy data taken for clean / the worst ambient method",
    "ambient_over_plain": "seconds per step, ambient / plain denoising",
    "consistency_over_official": "seconds per step, ambient + consistency / the official step's structure",
    "consistency_memory_over_official": "peak memory of that step, the same ratio",
    "ambient_over_encode_every_time": "seconds per step, ambient / encoding VAE and text in every step",
    "full_fused_gib": "GiB of a full fine-tune at 1024², batch 1: checkpointing, Adafactor, fused backward pass; computed",
    "lora_12gb_gib": "GiB of a LoRA at 1024², batch 4, with checkpointing; computed",
    "memory_over_measured": "how far such figures are from four steps measured on an H100, at most, as a part of them",
    "loader_over_step": "samples per second, the loader with one worker / training the miniature UNet",
    "loader_memory_growth": "resident memory of the loader with its worker, after ten epochs / after one",
    "exact_over_faiss_flat": "seconds, exact nearest neighbours / FAISS's flat index, 5,000 × 100,000 × 1024",
    **{
        f"study_{what}_{size}": f"{says}, {size} pictures"
        for size in (32, 128, 512)
        for what, says in (
            ("excess_cut", "part of the memorised excess that the best noisy method takes away, worst sampler"),
            ("fd_ratio", "its Fréchet distance / plain fine-tuning's"),
        )
    },
    "study_again": "part of the study's figures that a second run, with other noise, gives again within 95 % intervals",
    "cleared_copiers": "folders with a fifth or more of copies on the must-see list that end as cleared",
    "contradictions": "verdicts that contradict the exit code",
    "accused_innocents": "part of the folders without a copy that are accused",
    "coverage_of_shares": "how often the interval of the copied share covers the truth, over these folders",
    "found_when_present": "part of the folders with one or two training files among 130 images of which that is said",
    "faults_injected": "faults injected: killed, starved, damaged and doubled runs of every command",
    "second_observations": "faults after which some picture has two noisy latents",
    "silent_corruptions": "faults after which the continued run ends well with another result than the undisturbed one",
    "lost_finished_work": "faults after which finished shards, images or checkpoints are gone",
    "tracebacks": "faults that end in a traceback",
    "code_executed": "faults after which a planted payload ran",
    "not_resumed": "faults after which the run neither goes on nor says in one line what is damaged",
    "fuzz_failures": "inputs that a reader of stores, checkpoints or LoRAs neither reads nor refuses, coverage-guided",
    "fuzz_minutes": "minutes of that",
    "path_over_draw": "seconds of a draw from a picture's noise path at t_n = 500 / of a plain draw",
    "path_over_draw_round_levels": "the same at the worst multiple of 100",
    "path_over_draw_any_level": "the same at the worst of all levels",
    "verify_over_encode": "seconds of checking a store / of encoding it",
    "peak_gib_1m": "peak memory in GiB of a search in a million × 1024 embeddings, exact or with a FAISS shortlist",
}


def rows(folder: Path = RESULTS) -> list[str]:
    """Markdown rows: one per target of every result file, in the order of their names."""
    found = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        machine = record["environment"]["gpu"] or "CPU"
        for one in record["targets"]:
            sign = {"<=": "≤", ">=": "≥"}[one["sense"]]
            verdict = "met" if met(one) else "**missed**"
            value = f"{one['value']:.3g} | {sign} {one['limit']:g} | {verdict}"
            found.append(f"| {WHAT[one['name']]} | {value} | {machine}, `{path.name}` |")
    return found


def lines(folder: Path = RESULTS) -> list[str]:
    """The table in Markdown, line by line."""
    return ["| claim | measured | target | | where |", "|---|---|---|---|---|", *rows(folder)]


def table(folder: Path = RESULTS) -> str:
    """The table between its marks."""
    return "\n".join([START, *lines(folder), END])


def written(text: str, folder: Path = RESULTS) -> str:
    """``text`` with the table between the marks put anew; a ValueError where the marks are not there, once each."""
    return put_between(text, START, END, "\n".join(lines(folder)))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into README.md instead of printing it")
    if parser.parse_args(argv).write:
        readme = ROOT / "README.md"
        readme.write_text(written(readme.read_text()))
    else:
        print(table())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
