"""The report's figures → one HTML page that opens offline."""

from __future__ import annotations

import base64
import copy
import hashlib
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict, cast

import jinja2

from eval.choices import BASE
from eval.reporting.cautions import cautions
from eval.reporting.pictures import MOST_PICTURES, SMALL, Choice, Picture, Shown, choose
from eval.reporting.plots import RunPoint, model_curves, overview_curves, rate_curves, trade_off, training_curve
from eval.reporting.references import LEAST_RECALL, MUST_SEE
from eval.schema import AttackFigures, EstimateFigures, ImageRow, LocalCopy, ModelFigures, Report, SamplerFigures
from sdxl_ambient.images.folder import ledger_line
from sdxl_ambient.provenance import atomic

TOP_PAIRS, THRESHOLD_PAIRS, RANDOM_PAIRS = 8, 6, 4
NEAR_THRESHOLD = 16  # images nearest to the threshold, of which the pairs at it are drawn
MOST_ROWS = 500  # of a table of images
PICTURED_ROWS = 300  # with pictures, of all tables of images of a page
MOST_COPIED = 12
MOST_EXCLUDED = 200
# Keys that reports of schema 2 lack: a page can still be made from them.
_MODEL_ADDITIONS = ("run", "step", "worst_case")
_SAMPLER_ADDITIONS = (
    *("contained", "interval_other_prompts", "seeds", "difference_to_base", "excess_interval", "most_copied"),
    *("clip_score", "score_normalized"),
)
_ATTACK_ADDITIONS = ("auc_interval", "difference_to_base", "gap", "gap_standard_error")
# Columns that are left out where no sampler has them.
_SOMETIMES = (*_SAMPLER_ADDITIONS, "excess_over_heldout", "similarity_to_heldout", "fd_pixels")

Interval = list[float] | EstimateFigures | None
BaseDraws = tuple[SamplerFigures, dict[str, ImageRow]]  # the base model's figures, and its rows by the name of the file


class AttackRow(TypedDict):
    """One attack on one model; ``t`` is empty where it has no timestep."""

    model: str
    attack: str
    t: str
    figures: AttackFigures


def write_html(report: Report, output_dir: str | Path, choice: Choice | None = None) -> Path:
    """Write ``index.html`` beside report.json, whole or not at all, and return its path. ``choice``: see :func:`render`."""
    path = Path(output_dir) / "index.html"
    with atomic(path) as temporary:
        temporary.write_text(render(report, output_dir, choice), encoding="utf-8")
    return path


def render(report: Report, root: str | Path, choice: Choice | None = None) -> str:
    """The page. ``root`` is the folder that relative image folders in the report start from.

    ``choice``: the pictures that it embeds; by default what ``--pictures auto`` is beside the report's budget.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(_FILTERS)
    report = with_additions(report)
    shown = Shown(report, root, choice or choose("auto", report["settings"].get("max_excess")))
    return environment.get_template("report.html.j2").render(
        report=report,
        models=[_model(name, model, report, shown) for name, model in report["models"].items()],
        shown=shown,
        most_pictures=MOST_PICTURES,
        cautions=cautions(report),
        overview=overview_curves(report),
        curves=model_curves(report),
        rates=rate_curves(report),
        trade=trade_off(report),
        runs=runs(report),
        excluded=excluded(report, shown),
        must_see=MUST_SEE,
        least_recall=LEAST_RECALL,
        attacks=(attacks := attack_rows(report)),
        strongest=strongest(attacks),
        has_several=any(len(model["samplers"]) > 1 for model in report["models"].values()),
        has_more=any(len(model["samplers"]) > 2 for model in report["models"].values()),
        has={key: any(figures[key] is not None for figures in _all_samplers(report)) for key in _SOMETIMES},
        highest=max(report["models"], key=lambda name: report["models"][name]["share_above_threshold"] or 0.0),
    )


def with_additions(report: Report) -> Report:
    """A copy in which keys that came after schema 2 are there, as None where nothing else follows from the rest."""
    # Not yet what the types say: that is made of it here.
    whole: dict[str, Any] = copy.deepcopy(dict(report))
    whole["threshold"].setdefault("null", "heldout")
    whole["threshold"].setdefault("source_p_value")
    for model in whole["models"].values():
        model.setdefault("own_sampler", next(iter(model["samplers"])))
        _fill(model, _MODEL_ADDITIONS)
        for sampler in model["samplers"].values():
            _fill(sampler, _SAMPLER_ADDITIONS)
            for row in sampler["images"]:
                _fill(row, ("p_value", "score_normalized", "found"))
        for attack in (model["attacks"] or {}).values():
            _fill(attack, _ATTACK_ADDITIONS)
    return cast(Report, whole)


def _all_samplers(report: Report) -> list[SamplerFigures]:
    return [figures for model in report["models"].values() for figures in model["samplers"].values()]


def _fill(entry: dict[str, Any], keys: tuple[str, ...]) -> None:
    for key in keys:
        entry.setdefault(key)


def _model(name: str, model: ModelFigures, report: Report, shown: Shown) -> dict[str, Any]:
    """A model's own and worst sampler with their figures, tables and pictures."""
    names = dict.fromkeys([model["own_sampler"], model["worst_sampler"]])
    pictured = PICTURED_ROWS // sum(len({m["own_sampler"], m["worst_sampler"]}) for m in report["models"].values())
    samplers = [
        {
            "name": sampler,
            "figures": model["samplers"][sampler],
            "pairs": pair_groups(model["samplers"][sampler], report, shown, same_draws(model, sampler, report)),
            "images": image_table(model["samplers"][sampler], report, shown, pictured),
            "copied": copied_images(model["samplers"][sampler], shown),
        }
        for sampler in names
    ]
    return {
        "name": name,
        "model": model,
        "own": samplers[0],
        "worst": samplers[-1],
        "samplers": samplers,
        "found": found_pairs(model, shown),
        "text": verdict_text(model, shown),
    }


def verdict_text(model: ModelFigures, shown: Shown) -> str:
    """The verdict, without names of files where the page has none."""
    text = model["verdict"]["text"]
    if shown.names:
        return text
    text = re.sub(r" \(such as .*?\)(?=: frames of one burst)", "", text)
    names: dict[str, str] = {}
    for figures in model["samplers"].values():
        for copy_found in [*(figures["contained"] or {"copies": []})["copies"], *local_copies(figures)]:
            names[copy_found["file"]] = shown.generated_name(figures["folder"], copy_found["file"])
            names[copy_found["train"]] = shown.train_name(copy_found["train"])
    return _renamed(text, names)


def _renamed(text: str, names: dict[str, str]) -> str:
    """The text with whole names replaced by others, the longest first."""
    if not names:
        return text
    any_name = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.sub(rf"(?<![\w./-])(?:{any_name})(?![\w/-])", lambda match: names[match[0]], text)


def found_pairs(model: ModelFigures, shown: Shown) -> list[dict[str, Any]]:
    """The copies that were found without a threshold, each beside its training image; each pair of one sampler."""
    pairs: list[dict[str, Any]] = []
    for name, figures in model["samplers"].items():
        for copy_found in (figures["contained"] or {"copies": []})["copies"][:MOST_COPIED]:
            file, train = copy_found["file"], copy_found["train"]
            pairs.append(
                {
                    "sampler": name,
                    "kind": copy_found["kind"],
                    "generated": shown.generated_name(figures["folder"], file),
                    "file": shown.train_name(train),
                    "generated_picture": shown.generated(figures["folder"], file, None),
                    "train_picture": shown.train(train),
                }
            )
        pairs += [_local_pair(name, figures, local, shown) for local in local_copies(figures)[:MOST_COPIED]]
    return pairs


def local_copies(figures: SamplerFigures) -> list[LocalCopy]:
    """The copies of a part; none in reports that were made before they were looked for."""
    found = figures.get("local_copies")
    return found["copies"] if found else []


def _local_pair(sampler: str, figures: SamplerFigures, local: LocalCopy, shown: Shown) -> dict[str, Any]:
    return {
        "sampler": sampler,
        "kind": f"a part of it, {local['inliers']} keypoints" + (", mirrored" if local["mirrored"] else ""),
        "generated": shown.generated_name(figures["folder"], local["file"]),
        "file": shown.train_name(local["train"]),
        "generated_picture": shown.generated(figures["folder"], local["file"], None),
        "train_picture": shown.train(local["train"]),
        "regions": (_boxed(local["region"]), _boxed(local["train_region"])),
    }


def _boxed(region: list[float]) -> str:
    """A region as CSS has it."""
    left, top, right, bottom = (100 * value for value in region)
    return f"left:{left:.1f}%;top:{top:.1f}%;width:{right - left:.1f}%;height:{bottom - top:.1f}%"


def same_draws(model: ModelFigures, sampler: str, report: Report) -> BaseDraws | None:
    """The base model's images of the same prompts and seeds; None where there are none.

    Files of one name were drawn from one prompt and seed where as many images of the same kind were drawn.
    """
    figures, base = model["samplers"][sampler], report["models"].get(BASE)
    if base is None or base is model or model["kind"] not in ("lora", "unet"):
        return None
    other = base["samplers"].get(sampler, base["samplers"][base["own_sampler"]])
    ours, theirs = figures["settings"] or {}, other["settings"] or {}
    if other["n_generated"] != figures["n_generated"] or ours.get("mean_of") != theirs.get("mean_of"):
        return None
    return other, {row["file"]: row for row in other["images"]}


def _closest(rows: list[ImageRow]) -> list[ImageRow]:
    return sorted(rows, key=lambda row: (-row["similarity_to_train"], row["file"]))


def pair_groups(
    figures: SamplerFigures, report: Report, shown: Shown, base: BaseDraws | None = None
) -> list[dict[str, Any]]:
    """The closest pairs of one sampler, some about the threshold and some at random (always the same ones).

    ``base``: see :func:`same_draws`.
    """
    threshold, order = report["threshold"]["value"], _closest(figures["images"])
    top, rest = order[:TOP_PAIRS], order[TOP_PAIRS:]
    at: list[ImageRow] = []
    if threshold is not None:
        # A sample of those near it, since the nearest few may all lie on one side.
        near = sorted(rest, key=lambda row: (abs(row["similarity_to_train"] - threshold), row["file"]))[:NEAR_THRESHOLD]
        at = random.Random(0).sample(near, min(THRESHOLD_PAIRS, len(near)))
        rest = [row for row in rest if row not in at]
    chosen = random.Random(0).sample(rest, min(RANDOM_PAIRS, len(rest)))
    groups = [("The closest", top), ("At the threshold", at), ("Some at random", chosen)]
    return [
        {"title": title, "rows": [_pair(row, figures, threshold, shown, base) for row in _closest(rows)]}
        for title, rows in groups
        if rows
    ]


def _pair(
    row: ImageRow, figures: SamplerFigures, threshold: float | None, shown: Shown, base: BaseDraws | None
) -> dict[str, Any]:
    return {
        **_row(row, figures, threshold, shown),
        "generated_picture": shown.generated(figures["folder"], row["file"], row),
        "train_picture": shown.train(row["nearest_train"]),
        "base_picture": _of_base(row, base, shown),
    }


def _row(row: ImageRow, figures: SamplerFigures, threshold: float | None, shown: Shown) -> dict[str, Any]:
    """A row of the report as the page may name it."""
    return {
        **row,
        "file": shown.generated_name(figures["folder"], row["file"]),
        "prompt": shown.caption(row["prompt"]),
        "nearest_train": shown.train_name(row["nearest_train"]),
        "nearest_train_caption": shown.caption(row["nearest_train_caption"]),
        "found": shown.found(row["found"]),
        "above": _above(row, threshold),
    }


def _of_base(row: ImageRow, base: BaseDraws | None, shown: Shown) -> Picture | None:
    """The base model's picture of the same prompt and seed."""
    if base is None or (own := base[1].get(row["file"])) is None or own["prompt"] != row["prompt"]:
        return None
    return shown.generated(base[0]["folder"], own["file"], own)


def _above(row: ImageRow, threshold: float | None) -> bool:
    return threshold is not None and row["similarity_to_train"] > threshold


def copied_images(figures: SamplerFigures, shown: Shown) -> list[dict[str, Any]]:
    """The training images that most generated ones are nearest to, each beside the nearest of them."""
    rows = {row["file"]: row for row in figures["images"]}
    return [
        {
            **row,
            "file": shown.train_name(row["file"]),
            "caption": shown.caption(row["caption"]),
            "generated": shown.generated_name(figures["folder"], row["generated"]),
            "generated_picture": shown.generated(figures["folder"], row["generated"], rows.get(row["generated"])),
            "train_picture": shown.train(row["file"]),
        }
        for row in (figures["most_copied"] or [])[:MOST_COPIED]
    ]


# Key, title, and for numbers: digits, and whether small ones come first when sorted.
_IMAGE_COLUMNS = (
    ("file", "Generated file", None, True),
    ("prompt", "Prompt", None, True),
    ("similarity_to_train", "Similarity to T", 3, False),
    ("above", "Above threshold", None, False),
    ("nearest_train", "Nearest training image", None, True),
    ("found", "A copy without a threshold", None, True),
    ("similarity_to_heldout", "Similarity to H", 3, False),
    ("l2_ratio", "ℓ2 ratio", 2, True),
    ("p_value", "p-value", 4, True),
    ("score_normalized", "Score-normalised", 3, False),
)


def image_table(figures: SamplerFigures, report: Report, shown: Shown, pictured: int = 0) -> dict[str, Any]:
    """One row per image, the closest first, at most MOST_ROWS; columns without any value are left out.

    The first ``pictured`` rows have pictures, where the page has any.
    """
    threshold, rows = report["threshold"]["value"], list[dict[str, Any]]()
    pictured = pictured if shown.names else 0
    for i, row in enumerate(_closest(figures["images"])[:MOST_ROWS]):
        above = None if threshold is None else "yes" if _above(row, threshold) else "no"
        rows.append({**_row(row, figures, threshold, shown), "above": above})
        if i < pictured:
            rows[-1]["generated_picture"] = shown.generated(figures["folder"], row["file"], row, SMALL)
            if shown.choice.shown == "all":
                rows[-1]["train_picture"] = shown.train(row["nearest_train"], SMALL)
    names = ("key", "title", "digits", "ascending")
    columns = [dict(zip(names, c, strict=True)) for c in _IMAGE_COLUMNS if any(r.get(c[0]) is not None for r in rows)]
    return {"columns": columns, "rows": rows, "total": len(figures["images"]), "pictured": min(pictured, len(rows))}


def attack_rows(report: Report) -> list[AttackRow]:
    """Every model's attacks, named ATTACK/T in the report, or ATTACK where there is no timestep."""
    rows: list[AttackRow] = []
    for model, entry in report["models"].items():
        for name, figures in (entry["attacks"] or {}).items():
            attack, _, t = name.partition("/")
            rows.append({"model": model, "attack": attack, "t": t, "figures": figures})
    return rows


def strongest(rows: list[AttackRow]) -> list[AttackRow]:
    """Of each model the attack with the highest AUC."""
    best: dict[str, AttackRow] = {}
    for row in rows:
        held = best.setdefault(row["model"], row)
        if (row["figures"]["auc"] or 0.0) > (held["figures"]["auc"] or 0.0):
            best[row["model"]] = row
    return list(best.values())


def runs(report: Report) -> list[dict[str, Any]]:
    """Checkpoints of one training run side by side, in the order of their steps; runs of which there are at least two."""
    by_run: dict[str, list[RunPoint]] = {}
    for name, model in report["models"].items():
        if model["run"] is not None and model["step"] is not None:
            own, worst = model["own_sampler"], model["worst_sampler"]
            point: RunPoint = {
                "name": name,
                "step": model["step"],
                "own": model["samplers"][own],
                "worst": model["samplers"][worst],
                "own_name": own,
                "worst_name": worst,
            }
            by_run.setdefault(model["run"], []).append(point)
    several = {run: sorted(points, key=lambda p: p["step"]) for run, points in by_run.items() if len(points) > 1}
    return [{"name": run, "points": points, "svg": training_curve(points)} for run, points in several.items()]


def excluded(report: Report, shown: Shown) -> list[dict[str, Any]]:
    """What was left out of each set of images, at most MOST_EXCLUDED of it named; nothing where the page has no names."""
    most = MOST_EXCLUDED if shown.names else 0
    data = report["data"]
    sets = [("training set", data["train"])]
    if data["heldout"]:
        sets.append(("held-out set", data["heldout"]))
    generated = [
        (f"{name}, {sampler}", figures)
        for name, model in report["models"].items()
        for sampler, figures in model["samplers"].items()
        if figures["excluded"]
    ]
    return [_left_out(what, figures, most) for what, figures in sets + generated]


def _left_out(what: str, figures: Any, most: int) -> dict[str, Any]:
    rows, ledger = figures["excluded"], figures.get("ledger")  # reports of earlier versions have no ledger
    files = ledger_line(ledger) if ledger and ledger["files"] else None
    return {"what": what, "count": len(rows), "rows": rows[:most], "files": files}


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}".replace("-", "−")


def _ends(interval: Interval) -> tuple[float, float] | None:
    """(low, high) of an interval that is a pair, an estimate with ``low`` and ``high``, or None."""
    if interval is None:
        return None
    if isinstance(interval, dict):
        return interval["low"], interval["high"]
    low, high = interval
    return low, high


def _interval(interval: Interval, text: Callable[[float], str] = _share) -> str:
    ends = _ends(interval)
    return "–" if ends is None else f"{text(ends[0])} to {text(ends[1])}"


def _difference(estimate: EstimateFigures | None, text: Callable[[float], str] = _share) -> str:
    """A signed difference with its interval."""
    if estimate is None:
        return "–"
    sign = "+" if estimate["value"] > 0 else ""
    return f"{sign}{text(estimate['value'])} ({_interval(estimate, text)})"


def _script_hash(code: str) -> str:
    """What the page's Content-Security-Policy names its one script by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()


_FILTERS = {
    "number": _number,
    "share": _share,
    "interval": _interval,
    "interval_number": lambda interval: _interval(interval, _number),
    "difference": _difference,
    "difference_number": lambda estimate: _difference(estimate, _number),
    "estimate": lambda e: "–" if e is None else f"{_share(e['value'])} ({_interval(e)})",
    "quantile": lambda s, q, digits=3: "–" if s is None else _number(s["quantiles"][q], digits),
    "script_hash": _script_hash,
}
