"""What the study's rows say about each claim: contrasts paired by seed, judged by their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.study.grid import METHODS
from benchmarks.study.intervals import contrast, judged, judged_all, plain
from benchmarks.study.markdown import label, number, percent, steps_in_words
from benchmarks.study.rows import best_trade, copies, noisy_rows, pick, require
from eval.statistics.calibrate import Estimate


def _claim(says: str, estimate: Estimate, figure: str) -> dict:
    return {"claim": says, "verdict": judged(estimate), "contrast": plain(estimate), "figure": figure}


def claims(table: Sequence[dict]) -> list[dict]:
    """What the rows say about each claim; those whose rows were not run are left out."""
    found = []
    for size in sorted({r["size"] for r in table}):
        for make in (_copies, _less, _works, _cut, _quality, _no_more_than_base, _cheaper, _less_told):
            found += make(table, size)
    for size in sorted({r["size"] for r in table}):
        for make in (_hybrid_saves_skip, _consistency_gains, _levels_cost, _flat_errors, _similarity_shift):
            found += make(table, size)
    return found


def _less(table: Sequence[dict], size: int) -> list[dict]:
    clean, made = pick(table, "clean", size, sampler="full"), []
    if clean is None:
        return []
    for row in noisy_rows(table, size):
        if row["sampler"] == "early_stop":
            continue  # the worst case is the adapter's, whichever sampler its user has
        says = f"{size} images: {label(row)}: less memorised excess than plain fine-tuning at equal steps (worst sampler)"
        figure = f"{percent(row['worst_excess'])} against {percent(clean['worst_excess'])}"
        made.append(_claim(says, contrast(row, clean, "worst_by_seed", 1.0), figure))
    return made


def _works(table: Sequence[dict], size: int) -> list[dict]:
    """What is aimed at, asked of every method: a fifth of the copying at a tenth more distance. Sampled full or hybrid."""
    clean, made = pick(table, "clean", size, sampler="full"), []
    if clean is None or not copies(clean):
        return []
    for row in noisy_rows(table, size):
        if row["sampler"] == "early_stop":
            continue
        cut = 1 - row["worst_excess"]["value"] / clean["worst_excess"]["value"]
        ratio = row["fd"]["value"] / clean["fd"]["value"]
        both = contrast(row, clean, "worst_by_seed", 0.2), contrast(row, clean, "fd_by_seed", 1.1)
        sampled = f", {row['sampler']}" if row["sampler"] != "full" else ""
        says = f"{size} images: {label(row)}{sampled}: excess cut by at least 80 % and FD at most 10 % above plain's"
        found = _claim(says, both[0], f"cut by {cut:.0%}, FD × {ratio:.2f}")
        made.append({**found, "verdict": judged_all(both), "contrast_fd": plain(both[1])})
    return made


def _copies(table: Sequence[dict], size: int) -> list[dict]:
    clean = pick(table, "clean", size, sampler="full")
    if clean is None or len(clean["seeds"]) < 2:
        return []
    worst = clean["worst_excess"]
    found = Estimate(-worst["value"], -worst["high"], -worst["low"])
    says = f"{size} images: plain fine-tuning for {clean['steps']} steps copies (worst sampler)"
    return [_claim(says, found, percent(clean["worst_excess"]))]


def _cut(table: Sequence[dict], size: int) -> list[dict]:
    clean, row = pick(table, "clean", size, sampler="full"), best_trade(table, size)
    if clean is None or row is None or not copies(clean):
        return []
    cut = 1 - row["worst_excess"]["value"] / clean["worst_excess"]["value"]
    return [
        _claim(
            f"{size} images: {label(row)}: cuts the memorised excess by at least 80 % (worst sampler)",
            contrast(row, clean, "worst_by_seed", 0.2),
            f"cut by {cut:.0%}",
        )
    ]


def _quality(table: Sequence[dict], size: int) -> list[dict]:
    clean, row = pick(table, "clean", size, sampler="full"), best_trade(table, size)
    if clean is None or row is None:
        return []
    ratio = row["fd"]["value"] / clean["fd"]["value"]
    return [
        _claim(
            f"{size} images: {label(row)}: its Fréchet distance is at most 10 % above plain fine-tuning's",
            contrast(row, clean, "fd_by_seed", 1.1),
            f"{row['fd']['value']:.2f} / {clean['fd']['value']:.2f} = {ratio:.2f}",
        )
    ]


def _no_more_than_base(table: Sequence[dict], size: int) -> list[dict]:
    """Whether what is left differs from what the base model reaches by chance; undecided is the good news here."""
    row, base = best_trade(table, size), pick(table, "base", size)
    if row is None or base is None:
        return []
    says = f"{size} images: {label(row)}: copies within 5 points of what the base model does, which never saw the pictures"
    found = contrast(row, base, "worst_by_seed", 1.0, margin=0.05)
    return [_claim(says, found, f"{percent(row['worst_excess'])} against {percent(base['worst_excess'])}")]


def _cheaper(table: Sequence[dict], size: int) -> list[dict]:
    """Against the controls that cost nothing: of those whose FD is not surely worse, the one that copies least."""
    row = best_trade(table, size)
    if row is None:
        return []
    controls = [r for r in table if r["size"] == size and not METHODS[r["method"]].noisy and r["method"] != "base"]
    equal = [r for r in controls if contrast(row, r, "fd_by_seed", 1.0).high >= 0]
    says = f"{size} images: {label(row)}: copies less than every control whose FD is not surely worse"
    if not equal:
        best = min(controls, key=lambda r: r["fd"]["value"])
        figure = f"there is none; the best FD is {best['fd']['value']:.2f} ({label(best)}) against {row['fd']['value']:.2f}"
        return [{"claim": says, "verdict": "confirmed", "contrast": None, "figure": figure}]
    rival = min(equal, key=lambda r: r["worst_excess"]["value"])
    figure = (
        f"{percent(row['worst_excess'])} at FD {row['fd']['value']:.2f} against {percent(rival['worst_excess'])} at "
        f"{rival['fd']['value']:.2f} ({label(rival)}, {steps_in_words(rival)} steps, {rival['sampler']})"
    )
    return [_claim(says, contrast(row, rival, "worst_by_seed", 1.0), figure)]


def _less_told(table: Sequence[dict], size: int) -> list[dict]:
    """Attacks see what samplers do not show."""
    row, made = best_trade(table, size), []
    if row is None:
        return []
    controls = [r for r in table if r["size"] == size and r["sampler"] == "full"]
    for clean in (r for r in controls if r["method"] in ("clean", "clean_early")):
        stopped = "by its held-out loss" if clean["method"] == "clean_early" else f"after {clean['steps']} steps"
        says = f"{size} images: {label(row)}: attacks tell less than on plain fine-tuning stopped {stopped} (AUC)"
        figure = f"{number(row['auc'])} against {number(clean['auc'])}"
        made.append(_claim(says, contrast(row, clean, "auc_by_seed", 1.0), figure))
    return made


def _hybrid_saves_skip(table: Sequence[dict], size: int) -> list[dict]:
    made = []
    for t_n in sorted({r["t_n"] for r in table if r["method"] == "skip" and r["size"] == size}):
        hybrid, early = (require(table, "skip", size, t_n, sampler=s) for s in ("hybrid", "early_stop"))
        says = f"{size} images, t_n = {t_n}: levels left alone: hybrid sampling gives a lower FD than early_stop"
        figure = f"{hybrid['fd']['value']:.2f} against {early['fd']['value']:.2f}"
        made.append(_claim(says, contrast(hybrid, early, "fd_by_seed", 1.0), figure))
    return made


def _consistency_gains(table: Sequence[dict], size: int) -> list[dict]:
    made = []
    for t_n in sorted({r["t_n"] for r in table if r["method"] == "consistency" and r["size"] == size}):
        one, other = require(table, "consistency", size, t_n), pick(table, "skip", size, t_n, sampler="early_stop")
        if other:
            says = f"{size} images, t_n = {t_n}: consistency (sampled full) gives a lower FD than without it (early_stop)"
            figure = f"{one['fd']['value']:.2f} against {other['fd']['value']:.2f}"
            made.append(_claim(says, contrast(one, other, "fd_by_seed", 1.0), figure))
    return made


def _levels_cost(table: Sequence[dict], size: int) -> list[dict]:
    """The paper's order: a higher t_n has a higher FD."""
    made = []
    for method, sampler in (("skip", "early_stop"), ("consistency", "full"), ("restore_base", "full")):
        levels = sorted({r["t_n"] for r in table if r["method"] == method and r["size"] == size})
        if len(levels) > 1:
            low, high = (require(table, method, size, t, sampler=sampler) for t in (levels[0], levels[-1]))
            says = f"{size} images: {METHODS[method].says}: FD rises from t_n = {levels[0]} to {levels[-1]}"
            figure = ", ".join(f"{require(table, method, size, t, sampler=sampler)['fd']['value']:.2f}" for t in levels)
            made.append(_claim(says, contrast(low, high, "fd_by_seed", 1.0), figure))
    return made


def _flat_errors(table: Sequence[dict], size: int) -> list[dict]:
    """The paper's table of errors: training on noisier data hardly changes the error above t_n. Judged at the worst t."""
    clean, made = pick(table, "clean", size, sampler="full"), []
    if clean is None:
        return []
    for t_n in sorted({r["t_n"] for r in table if r["method"] == "skip" and r["size"] == size}):
        row = require(table, "skip", size, t_n, sampler="hybrid")
        levels = [t for t in row["errors"] if int(t) > t_n]
        pairs = {t: (_seeds(row, row["errors_by_seed"][t]), _seeds(clean, clean["errors_by_seed"][t])) for t in levels}
        worst = max((contrast(one, other, "values", 1.03) for one, other in pairs.values()), key=lambda e: e.high)
        ratios = {t: np.mean(one["values"]) / np.mean(other["values"]) for t, (one, other) in pairs.items()}
        says = f"{size} images, t_n = {t_n}: errors on held-out pictures above t_n are within 3 % of the clean model's"
        made.append(_claim(says, worst, ", ".join(f"t = {t}: × {r:.3f}" for t, r in ratios.items())))
    return made


def _seeds(row: dict, values: Sequence[float]) -> dict:
    return {"seeds": row["seeds"], "values": values}


def _similarity_shift(table: Sequence[dict], size: int) -> list[dict]:
    clean, made = pick(table, "clean", size, sampler="full"), []
    if clean is None:
        return []
    for row in noisy_rows(table, size):
        if row["sampler"] != "early_stop":
            one, other = (np.mean(r["returned_by_seed"]) for r in (row, clean))
            says = (
                f"{size} images: {label(row)}: what returns from t = 900 is less like its source than with the clean model"
            )
            found = contrast(row, clean, "returned_by_seed", 1.0)
            made.append(_claim(says, found, f"{one:.3f} against {other:.3f}"))
    return made
