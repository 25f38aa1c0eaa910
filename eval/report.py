"""report.json → one self-contained index.html: verdicts, table, curves, pairs, what was left out. Opens without a network.

python -m eval.report OUT      writes OUT/index.html again from OUT/report.json
"""

from __future__ import annotations

import base64
import io
import random
import sys
from pathlib import Path

import jinja2
import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from eval.images import data_uri
from sdxl_ambient.manifest import atomic, read_json

TOP_PAIRS, RANDOM_PAIRS = 8, 4
# Okabe & Ito's palette without its yellow: told apart by colour-blind readers, dark enough on white.
_COLOURS = ("#0072b2", "#d55e00", "#007a5a", "#a0438a", "#7a5c00", "#444444")
_STYLES = {"full": "-", "given": "-", "hybrid": "--", "early_stop": ":"}
_CONTROL = "#767676"


def write_html(report: dict, output_dir: str | Path) -> Path:
    """Write ``index.html`` beside report.json, whole or not at all, and return its path."""
    path = Path(output_dir) / "index.html"
    with atomic(path) as temporary:
        temporary.write_text(render(report, output_dir), encoding="utf-8")
    return path


def render(report: dict, root: str | Path) -> str:
    """The page. ``root`` is the folder that relative image folders in the report start from."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["share"] = lambda v: "–" if v is None else f"{v:.1%}"
    environment.filters["number"] = lambda v, digits=3: "–" if v is None else f"{v:.{digits}f}"
    pictures = _Pictures(Path(root))
    pairs = [
        {"model": name, "sampler": sampler, "groups": pair_groups(figures, report, pictures)}
        for name, model in report["models"].items()
        for sampler, figures in model["samplers"].items()
    ]
    return environment.get_template("report.html.j2").render(
        report=report, overview=overview_curves(report), details=model_curves(report), pairs=pairs
    )


class _Pictures:
    """Pictures as ``data:`` addresses, each file read once."""

    def __init__(self, root: Path):
        self.root = root
        self.made: dict[Path, str | None] = {}

    def __call__(self, folder: str, file: str) -> str | None:
        inside = self.root / folder / file
        path = inside if inside.is_file() else Path(folder) / file
        if path not in self.made:
            self.made[path] = data_uri(path)
        return self.made[path]


# -- pairs ---------------------------------------------------------------------------


def pair_groups(figures: dict, report: dict, pictures) -> list[dict]:
    """The closest pairs of one sampler and some at random (always the same ones), with their pictures."""
    order = sorted(figures["images"], key=lambda row: (-row["similarity_to_train"], row["file"]))
    top, rest = order[:TOP_PAIRS], order[TOP_PAIRS:]
    chosen = random.Random(0).sample(rest, min(RANDOM_PAIRS, len(rest)))
    chosen.sort(key=lambda row: (-row["similarity_to_train"], row["file"]))
    threshold = report["threshold"]["value"]
    groups = []
    for title, rows in (("The closest", top), ("Some at random", chosen)):
        if rows:
            groups.append({"title": title, "rows": [_pair(r, figures, report, threshold, pictures) for r in rows]})
    return groups


def _pair(row: dict, figures: dict, report: dict, threshold: float | None, pictures) -> dict:
    return {
        **row,
        "above": threshold is not None and row["similarity_to_train"] > threshold,
        "generated_picture": pictures(figures["folder"], row["file"]),
        "train_picture": pictures(report["data"]["train"]["folder"], row["nearest_train"]),
    }


# -- curves --------------------------------------------------------------------------


def survival(values) -> tuple[np.ndarray, np.ndarray]:
    """The share of values strictly above x, as a step function: (x, share) for a line drawn with steps after each x."""
    x = np.sort(np.asarray(values, dtype=np.float64))
    return np.concatenate([[min(x[0], 0.0)], x]), np.concatenate([[1.0], 1 - np.arange(1, len(x) + 1) / len(x)])


def _column(figures: dict, key: str) -> list[float]:
    return [row[key] for row in figures["images"]]


def overview_curves(report: dict) -> dict:
    """All models, each with its worst sampler, against the held-out images."""
    models = report["models"]
    lines = [("held-out images", report["controls"]["heldout_to_train"]["similarities"], _CONTROL, "-")]
    for name, colour in zip(models, _colours(len(models)), strict=True):
        sampler = models[name]["worst_sampler"]
        values = _column(models[name]["samplers"][sampler], "similarity_to_train")
        lines.append((f"{name} ({sampler})", values, colour, "-"))
    return {
        "svg": _plot(lines, report["threshold"]["value"], (7.4, 3.6)),
        "alt": "Share of images whose nearest training image is more similar than x, for held-out images and every model. "
        + _in_words(report),
    }


def _in_words(report: dict) -> str:
    """The curves' values at the threshold, for those who don't see them."""
    if report["threshold"]["value"] is None:
        return "No threshold could be calibrated."
    shares = [("held-out images", report["controls"]["heldout_to_train"]["share_above_threshold"])]
    shares += [(name, m["share_above_threshold"]) for name, m in report["models"].items()]
    return f"At the threshold {report['threshold']['value']:.3f}: " + ", ".join(f"{n} {s:.1%}" for n, s in shares) + "."


def model_curves(report: dict) -> list[dict]:
    """One figure per model: each sampler against training and held-out images, with the null and the base model behind."""
    models, null = report["models"], report["controls"]["heldout_to_train"]["similarities"]
    base = models.get("base")
    found = []
    for name, colour in zip(models, _colours(len(models)), strict=True):
        lines = [("held-out → training", null, _CONTROL, "-")]
        if base and name != "base":
            values = _column(base["samplers"][base["worst_sampler"]], "similarity_to_train")
            lines.append(("base → training", values, _COLOURS[-1], "-"))
        for sampler, figures in models[name]["samplers"].items():
            style = _STYLES.get(sampler, "-.")
            lines.append((f"{sampler} → training", _column(figures, "similarity_to_train"), colour, style))
        worst = models[name]["worst_sampler"]
        to_heldout = _column(models[name]["samplers"][worst], "similarity_to_heldout")
        lines.append((f"{worst} → held-out", to_heldout, "#b08fa8", "-."))
        alt = f"The same shares for {name}, one line per sampler, with held-out images and the base model for comparison."
        found.append({"model": name, "svg": _plot(lines, report["threshold"]["value"], (5.4, 3.4)), "alt": alt})
    return found


def _colours(count: int) -> list[str]:
    return [_COLOURS[i % (len(_COLOURS) - 1)] for i in range(count)]


def _plot(lines: list[tuple], threshold: float | None, size: tuple[float, float]) -> str:
    """Survival curves as an SVG ``data:`` address. Equal reports give equal bytes."""
    style = {"svg.fonttype": "none", "svg.hashsalt": "sdxl-ambient", "font.size": 9, "font.family": "sans-serif"}
    with rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        for label, values, colour, line in lines:
            width = 3.2 if colour == _CONTROL else 1.6  # the control stays visible below a model that follows it
            axes.step(*survival(values), where="post", label=label, color=colour, linestyle=line, linewidth=width)
        if threshold is not None:
            axes.axvline(threshold, color="#222222", linewidth=0.9)
            axes.annotate(
                "threshold ", (threshold, 1.0), xycoords=("data", "axes fraction"), ha="right", va="top", fontsize=8
            )
        low = min(np.quantile(values, 0.01) for _, values, _, _ in lines)
        axes.set_xlim(low - 0.02, 1.002)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("similarity to the nearest image")
        axes.set_ylabel("share of images above it")
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower left")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__.strip(), file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    try:
        print(write_html(read_json(Path(arguments[0]) / "report.json"), arguments[0]))
    except (OSError, ValueError, KeyError) as error:
        print(f"eval.report: error: {arguments[0]!r} has no usable report.json: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
