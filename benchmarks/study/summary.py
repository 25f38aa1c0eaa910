"""The study's cells → one row per method, level, size, length and user's sampler, with intervals over seeds; and its claims.

A cell's memorised excess is the share of its images above the threshold beside the fine-tuning set, less the share beside as
many held-out images (docs/EVALUATION.md). A model's is the worst over samplers, taken in each seed, so that it is one
figure per seed. Over seeds: the mean with Student's t interval, whose scatter holds training, noise draw and sampling; for
shares the wider of that and Newcombe's interval of the pooled counts, which does not collapse where all seeds agree. With
three seeds the t interval is 2.5 standard deviations to either side: wide, and honest.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from benchmarks.study.grid import METHODS
from eval.statistics.calibrate import Estimate, share_difference

CONFIDENCE = 0.95
# How each method's user samples; the first is the row's own where a method stands alone.
OWN = {"clean": ("full", "hybrid"), **{name: ("hybrid", "early_stop") for name in METHODS if name.startswith("skip")}}
QUALITY = ("precision", "recall", "density", "coverage")


# -- intervals -----------------------------------------------------------------------


def over_seeds(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Mean of one value per seed with Student's t interval; of a single one, without end."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return Estimate(float(values[0]), -math.inf, math.inf)
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return Estimate(float(values.mean()), float(values.mean() - half), float(values.mean() + half))


def within(estimate: Estimate, least: float, most: float) -> Estimate:
    """An interval cut to the values that there are; one without an end stays so."""
    ends = [e if math.isinf(e) else min(max(e, least), most) for e in (estimate.low, estimate.high)]
    return Estimate(estimate.value, *ends)


def plain(estimate: Estimate) -> dict:
    """For JSON, which has no infinity: None where an interval has no end."""
    ends = {name: end if math.isfinite(end) else None for name, end in (("low", estimate.low), ("high", estimate.high))}
    return {"value": estimate.value, **ends}


def excess_over_seeds(one_per_seed: Sequence[dict], confidence: float = CONFIDENCE) -> Estimate:
    """Mean excess of one sampler's figures per seed; the wider of the two intervals of the module's head."""
    excess = [f["excess_over_heldout"] for f in one_per_seed]
    found, total = over_seeds(excess, confidence), sum(f["n_generated"] for f in one_per_seed)
    beside_train = sum(f["share_above_threshold"] * f["n_generated"] for f in one_per_seed)
    beside_heldout = max(0.0, beside_train - sum(e * f["n_generated"] for e, f in zip(excess, one_per_seed, strict=True)))
    pooled = share_difference(beside_train, total, beside_heldout, total, confidence)
    if math.isinf(found.low):
        return Estimate(found.value, pooled.low, pooled.high)
    return Estimate(found.value, min(found.low, pooled.low), max(found.high, pooled.high))


# -- rows ----------------------------------------------------------------------------


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


def pick(table: Sequence[dict], method: str, size: int, t_n: int | None = None, steps=None, sampler=None) -> dict | None:
    """The row that is asked for, at its last length unless ``steps`` says another; None where it was not run."""
    found = [
        r
        for r in table
        if (r["method"], r["size"], r["t_n"]) == (method, size, t_n)
        and (sampler is None or r["sampler"] == sampler)
        and (steps is None or r["steps"] == steps)
    ]
    return max(found, key=lambda r: r["steps"], default=None) if steps is None else next(iter(found), None)


# -- claims --------------------------------------------------------------------------


def contrast(one: dict, other: dict, key: str, factor: float, margin: float = 0.0) -> Estimate:
    """value(one) − factor · value(other) − margin, paired by seed, with its t interval over the seeds that both have."""
    values = [dict(zip(row["seeds"], row[key], strict=True)) for row in (one, other)]
    common = sorted(values[0].keys() & values[1].keys())
    return over_seeds([values[0][s] - factor * values[1][s] - margin for s in common])


def judged(estimate: Estimate) -> str:
    """A claim that something is below zero."""
    if estimate.high < 0:
        return "confirmed"
    return "not confirmed" if estimate.low > 0 else "not decidable at this size"


def judged_all(estimates: Sequence[Estimate]) -> str:
    """A claim that all of them are below zero."""
    verdicts = [judged(e) for e in estimates]
    if "not confirmed" in verdicts:
        return "not confirmed"
    return "confirmed" if set(verdicts) == {"confirmed"} else "not decidable at this size"


def _claim(says: str, estimate: Estimate, figure: str) -> dict:
    return {"claim": says, "verdict": judged(estimate), "contrast": plain(estimate), "figure": figure}


def label(row: dict) -> str:
    level = "" if row["t_n"] is None else f", t_n = {row['t_n']}"
    return f"{METHODS[row['method']].says}{level}"


def noisy_rows(table: Sequence[dict], size: int) -> list[dict]:
    """The rows of methods that never see a clean latent, each at its last length."""
    return [r for r in table if r["size"] == size and METHODS[r["method"]].noisy and r["method"] != "clean_low"]


def best_trade(table: Sequence[dict], size: int) -> dict | None:
    """Of the noisy methods whose FD is at most 1.1 times the clean one's the one that surely copies least: whose worst
    excess has the lowest upper end, so that few seeds are no advantage."""
    clean = pick(table, "clean", size, sampler="full")
    fit = [r for r in noisy_rows(table, size) if clean and r["fd"]["value"] <= 1.1 * clean["fd"]["value"]]
    return min(fit, key=lambda r: r["worst_excess"]["high"], default=None)


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


def _less(table, size) -> list[dict]:
    clean = pick(table, "clean", size, sampler="full")
    made = []
    for row in noisy_rows(table, size) if clean else []:
        if row["sampler"] == "early_stop":
            continue  # the worst case is the adapter's, whichever sampler its user has
        says = f"{size} images: {label(row)}: less memorised excess than plain fine-tuning at equal steps (worst sampler)"
        figure = f"{percent(row['worst_excess'])} against {percent(clean['worst_excess'])}"
        made.append(_claim(says, contrast(row, clean, "worst_by_seed", 1.0), figure))
    return made


def _works(table, size) -> list[dict]:
    """What is aimed at, asked of every method: a fifth of the copying at a tenth more distance. Sampled full or hybrid."""
    clean, made = pick(table, "clean", size, sampler="full"), []
    for row in noisy_rows(table, size) if clean and copies(clean) else []:
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


def copies(row: dict) -> bool:
    """Whether a row's excess is surely above zero: without one there is nothing to cut."""
    return row["worst_excess"]["low"] > 0


def _copies(table, size) -> list[dict]:
    clean = pick(table, "clean", size, sampler="full")
    if clean is None or len(clean["seeds"]) < 2:
        return []
    found = Estimate(*(-clean["worst_excess"][key] for key in ("value", "high", "low")))
    says = f"{size} images: plain fine-tuning for {clean['steps']} steps copies (worst sampler)"
    return [_claim(says, found, percent(clean["worst_excess"]))]


def _cut(table, size) -> list[dict]:
    clean, row = pick(table, "clean", size, sampler="full"), best_trade(table, size)
    if row is None or not copies(clean):
        return []
    cut = 1 - row["worst_excess"]["value"] / clean["worst_excess"]["value"]
    return [
        _claim(
            f"{size} images: {label(row)}: cuts the memorised excess by at least 80 % (worst sampler)",
            contrast(row, clean, "worst_by_seed", 0.2),
            f"cut by {cut:.0%}",
        )
    ]


def _quality(table, size) -> list[dict]:
    clean, row = pick(table, "clean", size, sampler="full"), best_trade(table, size)
    if row is None:
        return []
    ratio = row["fd"]["value"] / clean["fd"]["value"]
    return [
        _claim(
            f"{size} images: {label(row)}: its Fréchet distance is at most 10 % above plain fine-tuning's",
            contrast(row, clean, "fd_by_seed", 1.1),
            f"{row['fd']['value']:.2f} / {clean['fd']['value']:.2f} = {ratio:.2f}",
        )
    ]


def _no_more_than_base(table, size) -> list[dict]:
    """Whether what is left differs from what the base model reaches by chance; undecided is the good news here."""
    row, base = best_trade(table, size), pick(table, "base", size)
    if row is None or base is None:
        return []
    says = f"{size} images: {label(row)}: copies within 5 points of what the base model does, which never saw the pictures"
    found = contrast(row, base, "worst_by_seed", 1.0, margin=0.05)
    return [_claim(says, found, f"{percent(row['worst_excess'])} against {percent(base['worst_excess'])}")]


def _cheaper(table, size) -> list[dict]:
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
        f"{rival['fd']['value']:.2f} ({label(rival)}, {_steps(rival)} steps, {rival['sampler']})"
    )
    return [_claim(says, contrast(row, rival, "worst_by_seed", 1.0), figure)]


def _less_told(table, size) -> list[dict]:
    """Attacks see what samplers do not show."""
    row, made = best_trade(table, size), []
    controls = [r for r in table if r["size"] == size and r["sampler"] == "full"] if row else []
    for clean in (r for r in controls if r["method"] in ("clean", "clean_early")):
        where = "by its held-out loss" if clean["method"] == "clean_early" else f"after {clean['steps']} steps"
        says = f"{size} images: {label(row)}: attacks tell less than on plain fine-tuning stopped {where} (AUC)"
        figure = f"{number(row['auc'])} against {number(clean['auc'])}"
        made.append(_claim(says, contrast(row, clean, "auc_by_seed", 1.0), figure))
    return made


def _hybrid_saves_skip(table, size) -> list[dict]:
    made = []
    for t_n in sorted({r["t_n"] for r in table if r["method"] == "skip" and r["size"] == size}):
        hybrid, early = (pick(table, "skip", size, t_n, sampler=s) for s in ("hybrid", "early_stop"))
        says = f"{size} images, t_n = {t_n}: levels left alone: hybrid sampling gives a lower FD than early_stop"
        figure = f"{hybrid['fd']['value']:.2f} against {early['fd']['value']:.2f}"
        made.append(_claim(says, contrast(hybrid, early, "fd_by_seed", 1.0), figure))
    return made


def _consistency_gains(table, size) -> list[dict]:
    made = []
    for t_n in sorted({r["t_n"] for r in table if r["method"] == "consistency" and r["size"] == size}):
        one, other = pick(table, "consistency", size, t_n), pick(table, "skip", size, t_n, sampler="early_stop")
        if other:
            says = f"{size} images, t_n = {t_n}: consistency (sampled full) gives a lower FD than without it (early_stop)"
            figure = f"{one['fd']['value']:.2f} against {other['fd']['value']:.2f}"
            made.append(_claim(says, contrast(one, other, "fd_by_seed", 1.0), figure))
    return made


def _levels_cost(table, size) -> list[dict]:
    """The paper's order: a higher t_n has a higher FD."""
    made = []
    for method, sampler in (("skip", "early_stop"), ("consistency", "full"), ("restore_base", "full")):
        levels = sorted({r["t_n"] for r in table if r["method"] == method and r["size"] == size})
        if len(levels) > 1:
            low, high = (pick(table, method, size, t, sampler=sampler) for t in (levels[0], levels[-1]))
            says = f"{size} images: {METHODS[method].says}: FD rises from t_n = {levels[0]} to {levels[-1]}"
            figure = ", ".join(f"{pick(table, method, size, t, sampler=sampler)['fd']['value']:.2f}" for t in levels)
            made.append(_claim(says, contrast(low, high, "fd_by_seed", 1.0), figure))
    return made


def _flat_errors(table, size) -> list[dict]:
    """The paper's table of errors: training on noisier data hardly changes the error above t_n. Judged at the worst t."""
    clean, made = pick(table, "clean", size, sampler="full"), []
    for t_n in sorted({r["t_n"] for r in table if r["method"] == "skip" and r["size"] == size}):
        row = pick(table, "skip", size, t_n, sampler="hybrid")
        if clean:
            pairs = {t: [_seeds(r, r["errors_by_seed"][t]) for r in (row, clean)] for t in row["errors"] if int(t) > t_n}
            worst = max((contrast(*pair, "values", 1.03) for pair in pairs.values()), key=lambda e: e.high)
            ratios = {t: np.mean(one["values"]) / np.mean(other["values"]) for t, (one, other) in pairs.items()}
            says = f"{size} images, t_n = {t_n}: errors on held-out pictures above t_n are within 3 % of the clean model's"
            made.append(_claim(says, worst, ", ".join(f"t = {t}: × {r:.3f}" for t, r in ratios.items())))
    return made


def _seeds(row: dict, values: Sequence[float]) -> dict:
    return {"seeds": row["seeds"], "values": values}


def _similarity_shift(table, size) -> list[dict]:
    clean, made = pick(table, "clean", size, sampler="full"), []
    for row in noisy_rows(table, size) if clean else []:
        if row["sampler"] != "early_stop":
            one, other = (np.mean(r["returned_by_seed"]) for r in (row, clean))
            says = (
                f"{size} images: {label(row)}: what returns from t = 900 is less like its source than with the clean model"
            )
            found = contrast(row, clean, "returned_by_seed", 1.0)
            made.append(_claim(says, found, f"{one:.3f} against {other:.3f}"))
    return made


# -- in words ------------------------------------------------------------------------


def percent(estimate: dict) -> str:
    value, low, high = (100 * estimate[k] for k in ("value", "low", "high"))
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"


def number(estimate: dict, digits: int = 2) -> str:
    value, low, high = (estimate[k] for k in ("value", "low", "high"))
    ends = "" if low is None else f" ({low:.{digits}f} to {high:.{digits}f})"
    return f"{value:.{digits}f}{ends}"


HEAD = (
    "| fine-tuned | steps | sampled | excess, own sampler | excess, worst sampler | best attack AUC | FD | AuthPct "
    "| coverage | CPU s |\n|---|---|---|---|---|---|---|---|---|---|"
)


def _steps(row: dict) -> str:
    return str(row["steps"]) if row["kept_steps"] is None else f"{row['kept_steps']:.0f} of {row['steps']}"


def markdown(table: Sequence[dict], wanted: Callable[[dict], bool] = lambda row: True) -> str:
    lines = [HEAD]
    for r in filter(wanted, table):
        lines.append(
            f"| {label(r)} | {_steps(r)} | {r['sampler']} | {percent(r['excess'])} | {percent(r['worst_excess'])} "
            f"| {number(r['auc'])} | {number(r['fd'])} | {r['authpct']['value']:.2f} | {r['coverage']:.2f} "
            f"| {r['cpu_seconds']:.0f} |"
        )
    return "\n".join(lines)
