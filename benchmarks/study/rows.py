"""The study's cells → one row per method, level, size, length and user's sampler, with intervals over seeds.

A cell's memorised excess is the share of its images above the threshold beside the fine-tuning set, less the share beside as
many held-out images (docs/EVALUATION.md). A model's is the worst over samplers, taken in each seed, so that it is one
figure per seed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from benchmarks.study.grid import METHODS
from benchmarks.study.intervals import excess_over_seeds, over_seeds, plain, within

# How each method's user samples; the first is the row's own where a method stands alone.
OWN = {"clean": ("full", "hybrid"), **{name: ("hybrid", "early_stop") for name in METHODS if name.startswith("skip")}}
QUALITY = ("precision", "recall", "density", "coverage")


def rows(cells: Sequence[dict]) -> list[dict]:
    """One row per method, level, size, length and user's sampler."""
    groups = defaultdict(list)
    for cell in cells:
        about = cell["cell"]
        for steps, found in cell["lengths"].items():
            groups[(about["size"], about["method"], about["t_n"], int(steps))].append((about["seed"], found, cell))
    made = []
    order = list(METHODS)
    for key in sorted(groups, key=lambda k: (k[0], order.index(k[1]), k[2] or 0, k[3])):
        seeds = sorted(groups[key], key=lambda one: one[0])
        for sampler in OWN.get(key[1], ("full",)):
            made.append(_row(key, sampler, seeds))
    return made


def _row(key: tuple, sampler: str, seeds: list[tuple]) -> dict:
    size, method, t_n, steps = key
    found = [f for _, f, _ in seeds]
    own, worst = [f["samplers"][sampler] for f in found], [f["samplers"][f["worst"]] for f in found]
    return {
        "size": size,
        "method": method,
        "t_n": t_n,
        "steps": steps,
        "sampler": sampler,
        "seeds": [seed for seed, _, _ in seeds],
        "excess": plain(excess_over_seeds(own)),
        "worst_excess": plain(excess_over_seeds(worst)),
        "worst_samplers": [f["worst"] for f in found],
        "worst_by_seed": [w["excess_over_heldout"] for w in worst],
        "share": float(np.mean([o["share_above_threshold"] for o in own])),
        "auc": plain(within(over_seeds([best_auc(f) for f in found]), 0.0, 1.0)),
        "auc_by_seed": [best_auc(f) for f in found],
        "fd": plain(over_seeds([o["fd_pixels"] for o in own])),
        "fd_by_seed": [o["fd_pixels"] for o in own],
        "authpct": plain(over_seeds([o["authpct"] for o in own])),
        **{name: float(np.mean([o["prdc"][name] for o in own])) for name in QUALITY},
        "errors": (by_level := errors(found)),
        "errors_by_seed": {t: [f["attacks"][f"error/{t}"]["mean_heldout"] for f in found] for t in by_level},
        "returned_by_seed": [f["attacks"]["one_step/900"]["mean_train"] for f in found],
        "kept_steps": _kept_steps([c for *_, c in seeds]),
        "cpu_seconds": float(np.mean([c["cost"]["cpu_seconds"] for _, _, c in seeds if not c["cost"].get("resumed")] or 0)),
    }


def _kept_steps(cells: Sequence[dict]) -> float | None:
    """Where held-out pictures chose the weights: the mean step of these."""
    kept = [c["cost"]["kept_step"] for c in cells if "kept_step" in c["cost"]]
    return float(np.mean(kept)) if kept else None


def best_auc(found: dict) -> float:
    """The attack that tells the sets apart best."""
    return max(one["auc"] for one in found["attacks"].values())


def errors(found: Sequence[dict]) -> dict[str, dict]:
    """Mean denoising error of held-out pictures by timestep, and the similarity of what comes back from noise."""
    levels = sorted((n for n in found[0]["attacks"] if n.startswith("error/")), key=lambda n: int(n.split("/")[1]))
    made = {}
    for name in levels:
        t = name.split("/")[1]
        back = [f["attacks"].get(f"one_step/{t}") for f in found]
        made[t] = {
            "heldout": float(np.mean([f["attacks"][name]["mean_heldout"] for f in found])),
            "train": float(np.mean([f["attacks"][name]["mean_train"] for f in found])),
            "similarity_train": float(np.mean([b["mean_train"] for b in back])) if all(back) else None,
            "similarity_heldout": float(np.mean([b["mean_heldout"] for b in back])) if all(back) else None,
        }
    return made


def pick(
    table: Sequence[dict],
    method: str,
    size: int,
    t_n: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
) -> dict | None:
    """The row that is asked for, at its last length unless ``steps`` says another; None where it was not run."""
    found = [
        r
        for r in table
        if (r["method"], r["size"], r["t_n"]) == (method, size, t_n)
        and (sampler is None or r["sampler"] == sampler)
        and (steps is None or r["steps"] == steps)
    ]
    return max(found, key=lambda r: r["steps"], default=None) if steps is None else next(iter(found), None)


def require(table: Sequence[dict], method: str, size: int, t_n: int | None = None, sampler: str | None = None) -> dict:
    """:func:`pick` of a row that is there; a LookupError where it is not."""
    row = pick(table, method, size, t_n, sampler=sampler)
    if row is None:
        raise LookupError(f"no row of {method}, {size} images, t_n {t_n}, sampled {sampler}")
    return row


def noisy_rows(table: Sequence[dict], size: int) -> list[dict]:
    """The rows of methods that never see a clean latent, each at its last length."""
    return [r for r in table if r["size"] == size and METHODS[r["method"]].noisy and r["method"] != "clean_low"]


def copies(row: dict) -> bool:
    """Whether a row's excess is surely above zero: without one there is nothing to cut."""
    return row["worst_excess"]["low"] > 0


def best_trade(table: Sequence[dict], size: int) -> dict | None:
    """Of the noisy methods whose FD is at most 1.1 times the clean one's the one that surely copies least: whose worst
    excess has the lowest upper end, so that few seeds are no advantage."""
    clean = pick(table, "clean", size, sampler="full")
    if clean is None:
        return None
    fit = [r for r in noisy_rows(table, size) if r["fd"]["value"] <= 1.1 * clean["fd"]["value"]]
    return min(fit, key=lambda r: r["worst_excess"]["high"], default=None)
