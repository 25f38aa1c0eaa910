"""Rows in words: figures with their intervals, labels, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.study.grid import METHODS


def label(row: dict) -> str:
    level = "" if row["t_n"] is None else f", t_n = {row['t_n']}"
    return f"{METHODS[row['method']].says}{level}"


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


def steps_in_words(row: dict) -> str:
    return str(row["steps"]) if row["kept_steps"] is None else f"{row['kept_steps']:.0f} of {row['steps']}"


def markdown(table: Sequence[dict], wanted: Callable[[dict], bool] = lambda row: True) -> str:
    lines = [HEAD]
    for r in filter(wanted, table):
        lines.append(
            f"| {label(r)} | {steps_in_words(r)} | {r['sampler']} | {percent(r['excess'])} | {percent(r['worst_excess'])} "
            f"| {number(r['auc'])} | {number(r['fd'])} | {r['authpct']['value']:.2f} | {r['coverage']:.2f} "
            f"| {r['cpu_seconds']:.0f} |"
        )
    return "\n".join(lines)
