"""report.json → the plots of the page, as SVG ``data:`` addresses with their texts. Equal reports give equal bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Literal, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from eval.schema import ModelFigures, Report, SamplerFigures, ThresholdFigures
from eval.statistics.calibrate import clopper_pearson

# Okabe & Ito's palette without its yellow: told apart by colour-blind readers, dark enough on white.
_COLOURS = ("#0072b2", "#d55e00", "#007a5a", "#a0438a", "#7a5c00")
_CONTROL, _BASE, _TO_HELDOUT = "#767676", "#444444", "#b08fa8"
_MARKERS = "osD^vPX<>*"
_MOST_POINTS = 1000  # of a drawn curve: a page with 10,000 images per model stays small
_GRID = 200  # places where the band of a rate is computed


class Line(NamedTuple):
    """A curve: its name in the legend, the similarities it is made of, and its looks."""

    label: str
    values: list[float]
    colour: str
    style: str = "-"
    width: float = 1.6


class Point(NamedTuple):
    """One sampler of one model: its Fréchet distance, and its share above the threshold with its interval."""

    model: str
    sampler: str
    distance: float
    share: float
    interval: list[float]


Look = tuple[str, Literal["full", "none"]]  # a colour, and how markers are filled


class Plot(TypedDict):
    """A picture and its text."""

    svg: str
    alt: str


class ModelPlot(Plot):
    """One model's."""

    model: str


class RunPoint(TypedDict):
    """One step of a training run: its checkpoint's name, and its own and its worst sampler."""

    name: str
    step: int
    own: SamplerFigures
    worst: SamplerFigures
    own_name: str
    worst_name: str


def survival(values: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The share of values strictly above x, as a step function: (x, share) for a line drawn with steps after each x."""
    x = np.sort(np.asarray(values, dtype=np.float64))
    return np.concatenate([[min(x[0], 0.0)], x]), np.concatenate([[1.0], 1 - np.arange(1, len(x) + 1) / len(x)])


# -- similarity curves ---------------------------------------------------------------


def overview_curves(report: Report) -> Plot:
    """All models, each with its worst sampler, against the held-out images."""
    models = report["models"]
    lines = _heldout_line(report, "held-out images")
    for (name, model), colour in zip(models.items(), _colours(models), strict=True):
        worst, style = model["worst_sampler"], ("-", "--", ":", "-.")[_round(models, name) % 4]
        lines.append(Line(f"{name} ({worst})", to_train(model, worst), colour, style))
    against = "for held-out images and every model" if len(lines) > len(models) else "for every model"
    alt = f"Share of images whose nearest training image is more similar than x, {against}. {_in_words(report)}"
    return {"svg": _curves(lines, report["threshold"]["value"], (6.6, 3.6)), "alt": alt}


def model_curves(report: Report) -> list[ModelPlot]:
    """One figure per model: own and worst sampler against T, the worst against H, beside H and the base model against T."""
    models, base = report["models"], report["models"].get("base")
    plots: list[ModelPlot] = []
    for (name, model), colour in zip(models.items(), _colours(models), strict=True):
        own, worst = model["own_sampler"], model["worst_sampler"]
        lines = _heldout_line(report, "held-out → training")
        if base and name != "base":
            lines.append(Line("base → training", to_train(base, base["own_sampler"]), _BASE))
        for sampler, style in {own: "-", worst: "-" if own == worst else "--"}.items():
            lines.append(Line(f"{sampler} → training", to_train(model, sampler), colour, style))
        to_heldout = _column(model["samplers"][worst], "similarity_to_heldout")
        if to_heldout:
            lines.append(Line(f"{worst} → held-out", to_heldout, _TO_HELDOUT, "-."))
        alt = f"The same shares for {name}: {', '.join(line.label for line in lines)}. " + _in_words(report, [name])
        plots.append({"model": name, "svg": _curves(lines, report["threshold"]["value"], (4.9, 3.3)), "alt": alt})
    return plots


def rate_curves(report: Report) -> list[ModelPlot]:
    """One figure per model: the share above a threshold as the threshold moves, on a log scale and with its interval.

    The model's worst sampler beside its control: held-out images, or the base model where there are none.
    """
    models, plots = report["models"], list[ModelPlot]()
    for (name, model), colour in zip(models.items(), _colours(models), strict=True):
        worst = model["worst_sampler"]
        control = _heldout_line(report, "held-out images")
        if not control and name != "base" and "base" in models:
            control = [Line("base model", to_train(models["base"], models["base"]["own_sampler"]), _CONTROL, width=3.2)]
        lines = [*control, Line(f"{name} ({worst})", to_train(model, worst), colour)]
        beside = f" and {control[0].label}" if control else ""
        alt = f"Share above the threshold as the threshold moves, on a log scale: {name} with its interval{beside}. "
        svg = _draw(lambda axes, lines=lines: _rates(axes, lines, report["threshold"]), (4.9, 3.3))
        plots.append({"model": name, "svg": svg, "alt": alt + _in_words(report, [name])})
    return plots


def to_train(model: ModelFigures, sampler: str) -> list[float]:
    """Each image's similarity to its nearest training image."""
    return _column(model["samplers"][sampler], "similarity_to_train")


def _column(figures: SamplerFigures, key: Literal["similarity_to_train", "similarity_to_heldout"]) -> list[float]:
    return [value for row in figures["images"] if (value := row[key]) is not None]


def _heldout_line(report: Report, label: str) -> list[Line]:
    """The held-out images' own similarities to T, wide so that it stays visible below a model that follows it."""
    heldout = report["controls"]["heldout_to_train"]
    return [Line(label, heldout["similarities"], _CONTROL, width=3.2)] if heldout else []


def _in_words(report: Report, names: list[str] | None = None) -> str:
    """The curves' values at the threshold, for those who don't see them."""
    if report["threshold"]["value"] is None:
        return "No threshold could be calibrated."
    heldout, shares = report["controls"]["heldout_to_train"], []
    if heldout:
        shares.append(("held-out images", heldout["share_above_threshold"]))
    shares += [(name, report["models"][name]["share_above_threshold"]) for name in names or report["models"]]
    return f"At the threshold {report['threshold']['value']:.3f}: " + ", ".join(f"{n} {s:.1%}" for n, s in shares) + "."


def _curves(lines: list[Line], threshold: float | None, size: tuple[float, float]) -> str:
    def paint(axes: Axes) -> None:
        for line in lines:
            x, share = survival(line.values)
            keep = _thinned(len(x))
            axes.step(x[keep], share[keep], where="post", label=line.label, color=line.colour, ls=line.style, lw=line.width)
        _mark_threshold(axes, threshold)
        axes.set_xlim(min(np.quantile(line.values, 0.01) for line in lines) - 0.02, 1.002)
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(_PERCENT)
        axes.set(xlabel="similarity to the nearest image", ylabel="share of images above it")
        axes.legend(frameon=False, loc="lower left", fontsize=8.5)

    return _draw(paint, size)


def _thinned(n: int) -> np.ndarray:
    """Places of a sorted curve of n points to draw: evenly, and all of the last, where copies are."""
    if n <= _MOST_POINTS:
        return np.arange(n)
    return np.union1d(np.linspace(0, n - 1, _MOST_POINTS // 2).astype(int), np.arange(n - _MOST_POINTS // 2, n))


def _rates(axes: Axes, lines: list[Line], threshold: ThresholdFigures) -> None:
    """Shares above each x; the last line's with its Clopper–Pearson band."""
    # What one image in the larger of the sets would be, a little below: shares of zero lie under the axis.
    floor = 0.5 / max(len(line.values) for line in lines)
    left = min(np.quantile(line.values, 0.5) for line in lines) - 0.02
    grid = np.linspace(left, 1.0, _GRID)
    for line in lines:
        x, share = survival(line.values)
        at = share[np.searchsorted(x, grid, side="right") - 1]
        axes.step(grid, np.where(at > 0, at, np.nan), where="post", label=line.label, color=line.colour, lw=line.width)
    n = len(lines[-1].values)
    low, high = np.array([clopper_pearson(int(round(s * n)), n, threshold["confidence"]) for s in at]).T
    band = f"its {threshold['confidence']:.0%} interval"
    axes.fill_between(grid, np.maximum(low, floor), high, step="post", color=lines[-1].colour, alpha=0.18, lw=0, label=band)
    _mark_threshold(axes, threshold["value"])
    axes.set_yscale("log")
    axes.set_ylim(floor, 1.0)
    axes.set_xlim(left, 1.002)
    axes.yaxis.set_major_formatter(_PERCENT)
    axes.set(xlabel="threshold on the similarity to T", ylabel="share of images above it")
    axes.legend(frameon=False, loc="lower left", fontsize=8.5)


def _mark_threshold(axes: Axes, threshold: float | None) -> None:
    if threshold is not None:
        axes.axvline(threshold, color="#222222", linewidth=0.9)
        axes.annotate("threshold ", (threshold, 1.0), xycoords=("data", "axes fraction"), ha="right", va="top", fontsize=8.5)


# -- copying beside quality, and over a run ------------------------------------------


def trade_off(report: Report) -> Plot | None:
    """Fréchet distance of the embeddings against the share above the threshold; None below three points."""
    points = [
        Point(name, sampler, distance, share, interval)
        for name, model in report["models"].items()
        for sampler, s in model["samplers"].items()
        if (distance := s["fd_embedding"]) is not None
        and (share := s["share_above_threshold"]) is not None
        and (interval := s["interval"]) is not None
    ]
    if len(points) < 3:
        return None
    models = report["models"]
    colours: dict[str, Look] = {
        n: (c, "full" if _round(models, n) % 2 == 0 else "none") for n, c in zip(models, _colours(models), strict=True)
    }
    markers = {s: _MARKERS[i % len(_MARKERS)] for i, s in enumerate(dict.fromkeys(p.sampler for p in points))}
    words = [f"{p.model} {p.sampler}: FD {p.distance:.1f}, {p.share:.1%}" for p in points[:12]]
    rest = f"; and {len(points) - 12} more" if len(points) > 12 else ""
    svg = _draw(lambda axes: _scatter(axes, points, colours, markers), (6.6, 3.6))
    return {"svg": svg, "alt": f"Share above the threshold against Fréchet distance. {'; '.join(words)}{rest}."}


def _scatter(axes: Axes, points: list[Point], colours: dict[str, Look], markers: dict[str, str]) -> None:
    """``colours``: per model its colour and how its markers are filled; ``markers``: per sampler."""
    for p in points:
        colour, fill = colours[p.model]
        low, high = p.interval
        axes.vlines(p.distance, low, high, color=colour, alpha=0.35, linewidth=1.4)
        marker = markers[p.sampler]
        axes.plot(p.distance, p.share, marker, color=colour, fillstyle=fill, markersize=6.5, clip_on=False, zorder=3)
    for label, (colour, fill) in colours.items():
        axes.plot([], [], "s", color=colour, fillstyle=fill, label=label)
    for label, marker in markers.items():
        axes.plot([], [], marker, color="white", markeredgecolor="#444444", label=label)
    axes.set_ylim(0, None)
    axes.yaxis.set_major_formatter(_PERCENT)
    axes.set(xlabel="Fréchet distance of embeddings to H (small: good)", ylabel="share above the threshold")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8.5)


def training_curve(points: list[RunPoint]) -> str | None:
    """Copying, and quality where it is known, against the training step."""
    if any(p["worst"]["share_above_threshold"] is None for p in points):
        return None
    quality = all(p["own"]["fd_embedding"] is not None for p in points)
    return _draw(lambda *axes: _over_steps(axes, points), (7.4 if quality else 4.9, 3.2), panels=1 + quality)


def _over_steps(axes: tuple[Axes, ...], points: list[RunPoint]) -> None:
    steps, worst = [p["step"] for p in points], [p["worst"] for p in points]
    share = np.array([w["share_above_threshold"] for w in worst])
    low, high = np.array([w["interval"] for w in worst]).T
    # Clopper–Pearson intervals hold the share up to rounding; matplotlib refuses lengths below 0.
    lengths = np.maximum(0, [share - low, high - share])
    axes[0].errorbar(steps, share, lengths, color=_COLOURS[0], marker="o", capsize=3, label="worst sampler")
    if any(p["own_name"] != p["worst_name"] for p in points):
        own = np.array([p["own"]["share_above_threshold"] for p in points], dtype=float)
        axes[0].plot(steps, own, "--s", color=_COLOURS[1], markersize=5, label="own sampler")
        axes[0].legend(frameon=False, fontsize=8.5)
    axes[0].set_ylim(0, None)
    axes[0].yaxis.set_major_formatter(_PERCENT)
    axes[0].set(xlabel="training step", ylabel="share above the threshold", xticks=steps)
    for other in axes[1:]:
        distances = np.array([p["own"]["fd_embedding"] for p in points], dtype=float)
        other.plot(steps, distances, "-o", color=_COLOURS[2])
        other.set(xlabel="training step", ylabel="Fréchet distance to H, own sampler", xticks=steps)


# -- drawing -------------------------------------------------------------------------

_PERCENT = FuncFormatter(lambda value, _: f"{value * 100:.4g} %")


def _colours(models: dict[str, ModelFigures]) -> list[str]:
    """The base model's is its own; the others' return after five, told apart by :func:`_round`."""
    rest = iter(range(len(models)))
    return [_BASE if name == "base" else _COLOURS[next(rest) % len(_COLOURS)] for name in models]


def _round(models: dict[str, ModelFigures], name: str) -> int:
    """How often the colours were used up before this model's."""
    return [n for n in models if n != "base"].index(name) // len(_COLOURS) if name != "base" else 0


def _draw(paint: Callable[..., None], size: tuple[float, float], panels: int = 1) -> str:
    """An SVG as a ``data:`` address; ``paint`` is given the axes of its panels."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "sdxl-ambient", "font.size": 9.5, "font.family": "sans-serif"}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        for one in axes:
            one.grid(color="#e4e4e4", linewidth=0.6)
            one.set_axisbelow(True)
            one.spines[["top", "right"]].set_visible(False)
        paint(*axes)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
