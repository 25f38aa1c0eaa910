"""study.json → the tables of README.md, docs/STUDY.md and docs/REPRODUCTION.md, between their marks, and the figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from benchmarks.marks import put_between
from benchmarks.record import ROOT
from benchmarks.study.grid import METHODS
from benchmarks.study.markdown import label, markdown, number
from benchmarks.study.rows import noisy_rows, pick

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

IMAGES = ROOT / "docs/images"
MAIN_SIZE = 32
VARIANTS = ("skip_short", "skip_rank2", "skip_dropout", "skip_near")  # of the ambient loss alone, that did not rescue it
COLOURS = {name: plt.get_cmap("tab20")(i) for i, name in enumerate(METHODS)}


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: python -m benchmarks.study --summarise -->", f"<!-- /{name} -->"


def put(text: str, name: str, body: str) -> str:
    """``text`` with ``body`` between the marks of ``name``; a ValueError where the marks are not there, once each."""
    return put_between(text, *marks(name), body)


def short_table(table: Sequence[dict]) -> str:
    """README's: the main size, every method at its last length, as its user samples it, without the variants."""
    wanted = [r for r in table if r["size"] == MAIN_SIZE and r["sampler"] != "early_stop" and r["method"] not in VARIANTS]
    last = {}
    for row in wanted:
        last[row["method"]] = max(last.get(row["method"], 0), row["steps"])
    return markdown([r for r in wanted if r["steps"] == last[r["method"]]])


def full_tables(table: Sequence[dict]) -> str:
    parts = []
    for size in sorted({row["size"] for row in table}):
        seeds = sorted({len(row["seeds"]) for row in table if row["size"] == size})
        caption = f"{seeds[0]} seeds" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
        parts.append(f"**{size} images, {caption}**\n\n{markdown(table, lambda r, size=size: r['size'] == size)}")
    return "\n\n".join(parts)


def claim_list(claims: Sequence[dict]) -> str:
    head = "| claim | verdict | figure |\n|---|---|---|"
    return "\n".join([head, *(f"| {c['claim']} | {c['verdict']} | {c['figure']} |" for c in claims)])


# The paper's FIDs (Table 1) and its latent errors at t = 900, 800, 500, 100 (Table 3), by t_n; None for clean.
PAPER_FID = {"skip": {None: 9.93, 100: 14.95, 500: 19.82, 800: 29.19}, "consistency": {100: 11.04, 500: 11.26, 800: 20.26}}
PAPER_ERRORS = {
    100: {"900": 0.3369, "800": 0.2974, "500": 0.2153, "100": 0.0405},
    500: {"900": 0.3377, "800": 0.2978, "500": 0.2159, "100": 0.0409},
    800: {"900": 0.3375, "800": 0.3001, "500": 0.2182, "100": 0.0411},
}
PAPER_SIMILARITY = {None: 0.698, 500: 0.626}


def paper_tables(table: Sequence[dict], size: int = MAIN_SIZE) -> str:
    """The paper's figures beside ours: quality by t_n, errors relative to those at t_n = 100, and the noise attack."""
    found: dict[str, dict[int | None, dict | None]] = {
        "skip": {t: pick(table, "skip", size, t, sampler="early_stop") for t in (100, 500, 800)},
        "consistency": {t: pick(table, "consistency", size, t, sampler="full") for t in (100, 500, 800)},
    }
    found["skip"][None] = pick(table, "clean", size, sampler="full")
    return "\n\n".join([_paper_quality(found), _paper_errors(found["skip"]), _paper_similarity(found["skip"])])


def _paper_quality(found: dict) -> str:
    lines = ["| quality, lower is better | clean | t_n = 100 | 500 | 800 |", "|---|---|---|---|---|"]
    for name, says in (("skip", "no consistency"), ("consistency", "with consistency")):
        levels = (None, 100, 500, 800)
        paper = [f"{PAPER_FID[name][t]:.2f}" if t in PAPER_FID[name] else "" for t in levels]
        ours = [_distance(found[name], t) for t in levels]
        lines += [f"| paper, {says}: FID | {' | '.join(paper)} |", f"| ours, {says}: FD | {' | '.join(ours)} |"]
    return "\n".join(lines)


def _distance(found: dict, t_n: int | None) -> str:
    if t_n not in found:
        return ""
    return number(found[t_n]["fd"]) if found[t_n] else "not run"


def _paper_errors(found: dict) -> str:
    head = "| error at t, as a part of the model's at t_n = 100 | 900 | 800 | 500 | 100 |\n|---|---|---|---|---|"
    lines, first = [head], found[100]
    for t_n in (500, 800):
        paper = [f"{PAPER_ERRORS[t_n][t] / PAPER_ERRORS[100][t]:.3f}" for t in PAPER_ERRORS[100]]
        lines.append(f"| paper, t_n = {t_n} | {' | '.join(paper)} |")
        if first and found[t_n]:
            ours = [f"{found[t_n]['errors'][t]['heldout'] / first['errors'][t]['heldout']:.3f}" for t in PAPER_ERRORS[100]]
            lines.append(f"| ours, t_n = {t_n} | {' | '.join(ours)} |")
    return "\n".join(lines)


def _paper_similarity(found: dict) -> str:
    lines = ["| noise attack at t = 900: mean similarity to the source | clean | t_n = 500 |", "|---|---|---|"]
    lines.append(f"| paper | {PAPER_SIMILARITY[None]:.3f} | {PAPER_SIMILARITY[500]:.3f} |")
    for says, key in (("ours", "similarity_train"), ("ours, held-out pictures", "similarity_heldout")):
        ours = [f"{found[t]['errors']['900'][key]:.3f}" if found[t] else "not run" for t in (None, 500)]
        lines.append(f"| {says} | {' | '.join(ours)} |")
    return "\n".join(lines)


PAGES = ("README.md", "docs/STUDY.md", "docs/REPRODUCTION.md")


def pages(record: dict, texts: Sequence[str]) -> list[str]:
    """The texts of PAGES with the record's tables put anew."""
    table, claims = record["figures"]["rows"], record["figures"]["claims"]
    readme, study, reproduction = texts
    study = put(put(study, "rows", full_tables(table)), "claims", claim_list(claims))
    return [put(readme, "study", short_table(table)), study, put(reproduction, "paper", paper_tables(table))]


def write_pages(record: dict) -> None:
    paths = [ROOT / name for name in PAGES]
    for path, text in zip(paths, pages(record, [p.read_text() for p in paths]), strict=True):
        path.write_text(text)
    draw(record["figures"]["rows"], IMAGES)


# -- figures -------------------------------------------------------------------------


def draw(table: Sequence[dict], folder: Path) -> None:
    shown = [row for row in table if row["sampler"] != "early_stop"]  # far to the right, and with the excess of hybrid
    sizes = [s for s in sorted({row["size"] for row in shown}) if sum(row["size"] == s for row in shown) > 1]
    figure, axes = plt.subplots(len(sizes), 1, figsize=(10, 5.5 * len(sizes)), squeeze=False)
    for size, axis in zip(sizes, axes[:, 0], strict=True):
        _pareto(axis, [row for row in shown if row["size"] == size], size)
        axis.set_ylabel("memorised excess, worst sampler")
    _save(figure, folder / "study_pareto.png")
    levels = {(r["method"], r["t_n"]) for r in noisy_rows(table, MAIN_SIZE)}
    swept = sorted({m for m, _ in levels if sum(one == m for one, _ in levels) > 1})
    if swept:
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
        for method in swept:
            _sweep(axes, [r for r in table if r["method"] == method and r["size"] == MAIN_SIZE], method)
        axes[0].set_ylabel("memorised excess, worst sampler")
        axes[1].set_ylabel("Fréchet distance, pooled pixels")
        axes[1].legend(fontsize=7)
        _save(figure, folder / "study_levels.png")


def bars(estimates: Sequence[dict]) -> list[list[float]] | None:
    """Lengths of error bars down and up; None where an interval has no end."""
    if any(e["low"] is None for e in estimates):
        return None
    return [[max(0.0, e["value"] - e["low"]) for e in estimates], [max(0.0, e["high"] - e["value"]) for e in estimates]]


def _pareto(axis, table: Sequence[dict], size: int) -> None:
    """Memorisation against quality: the lower left is better; bars are 95 % intervals over seeds."""
    for i, row in enumerate(table, 1):
        x, y = row["fd"], row["worst_excess"]
        axis.errorbar(
            x["value"], y["value"], xerr=bars([x]), yerr=bars([y]), fmt="o" if METHODS[row["method"]].noisy else "s",
            color=COLOURS[row["method"]], ms=9, lw=0.6, label=f"{i}  {_short(row)}",
        )  # fmt: skip
        axis.annotate(str(i), (x["value"], y["value"]), fontsize=6.5, ha="center", va="center", color="white")
    axis.set_title(f"{size} images: squares clean, circles noisy", fontsize=9)
    axis.set_xlabel("Fréchet distance to held-out, pooled pixels")
    low, high = (sorted(row["fd"]["value"] for row in table)[i] for i in (0, -1))
    axis.set_xlim(low - 0.5, high + 0.5)
    axis.set_ylim(-0.1, 1.0)
    axis.axhline(0, color="0.8", lw=0.8, zorder=0)
    axis.legend(fontsize=6.5, loc="upper left", bbox_to_anchor=(1.01, 1.0), markerscale=0.5, frameon=False)


def _short(row: dict) -> str:
    level = "" if row["t_n"] is None else f", t_n {row['t_n']}"
    steps = f", {row['steps']} steps" if row["method"] == "clean" else ""
    sampler = "" if row["sampler"] == "full" else f", {row['sampler']}"
    return f"{row['method']}{level}{steps}{sampler}"


def _sweep(axes, table: Sequence[dict], method: str) -> None:
    table = sorted((r for r in table if r["sampler"] != "early_stop"), key=lambda r: r["t_n"])
    for axis, key in zip(axes, ("worst_excess", "fd"), strict=True):
        values = [r[key] for r in table]
        axis.errorbar(
            [r["t_n"] for r in table], [v["value"] for v in values], bars(values),
            color=COLOURS[method], marker="o", lw=1, capsize=2, label=label(table[0]).split(", t_n")[0],
        )  # fmt: skip
        axis.set_xlabel("t_n")


def _save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
