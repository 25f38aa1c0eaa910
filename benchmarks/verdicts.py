"""Whether the evaluation's verdicts are right: folders of which it is known what they hold, judged as users would.

    python -m benchmarks.verdicts [--quick] [--train DIR --heldout DIR --fresh DIR] --json benchmarks/results/verdicts.json

Every cell is a folder of images of which a share are training pictures, changed in one way, among others that the model
never saw. By default they are the emoji that come with the miniature; any three folders of one source can be given. All
cells go through ``eval.memorization`` with its defaults, and a budget.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

from benchmarks.record import target, write_record
from eval.evaluation import evaluate
from eval.options import MemorizationOptions
from eval.reporting.verdict import decide
from eval.schema import ModelFigures
from eval.settings import evaluation_settings
from eval.views import centre_crop
from sdxl_ambient.config.parser import load_options
from sdxl_ambient.images.load import list_images, load_rgb

DATA = Path(__file__).resolve().parents[1] / "miniature/data"
BUDGET, SIZE = 0.05, 130
TARGETS = (
    ("cleared_copiers", "<=", 0),
    ("contradictions", "<=", 0),
    ("accused_innocents", "<=", 0.05),
    ("coverage_of_shares", ">=", 0.93),
    ("found_when_present", ">=", 0.95),
)
Change = Callable[[Image.Image], Image.Image]


def _jpeg(quality: int) -> Change:
    def change(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer).convert("RGB")

    return change


def _pasted(image: Image.Image) -> Image.Image:
    canvas = Image.effect_noise(image.size, 60).convert("RGB")
    canvas.paste(image.resize((image.width // 2, image.height // 2)), (0, 0))
    return canvas


def _half(image: Image.Image) -> Image.Image:
    canvas = Image.effect_noise(image.size, 60).convert("RGB")
    canvas.paste(image.crop((0, 0, image.width // 2, image.height)), (0, 0))
    return canvas


def _letterboxed(image: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", image.size, "black")
    canvas.paste(image.resize((image.width, image.height * 3 // 4)), (0, image.height // 8))
    return canvas


def _bordered(image: Image.Image) -> Image.Image:
    return ImageOps.expand(image, border=max(1, image.width // 10), fill="black").resize(image.size)


# The changes on the evaluation's must-see list, and others, of which it only has to say that it doesn't see them.
MUST_SEE: dict[str, Change] = {
    "unchanged": lambda image: image,
    "JPEG 75": _jpeg(75),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(max(1.0, image.width / 64))),
    "mirrored": ImageOps.mirror,
    "middle .9": lambda image: centre_crop(image).resize(image.size, Image.Resampling.LANCZOS),
}


def _frame(image: Image.Image) -> Image.Image:
    """Another frame of a burst: moved by a fortieth, a little larger and brighter."""
    moved = ImageChops.offset(image, max(1, image.width // 40), max(1, image.height // 40))
    return ImageEnhance.Brightness(centre_crop(moved, 0.96).resize(image.size, Image.Resampling.BICUBIC)).enhance(1.06)


OTHERS: dict[str, Change] = {
    "another frame": _frame,
    "upside down": lambda image: image.transpose(Image.Transpose.ROTATE_180),
    "turned": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "bordered": _bordered,
    "letterboxed": _letterboxed,
    "middle .8": lambda image: centre_crop(image, 0.8).resize(image.size, Image.Resampling.LANCZOS),
    "shifted": lambda image: ImageChops.offset(image, max(1, image.width // 24), 0),
    "pasted into a quarter": _pasted,
    "left half": _half,
    "JPEG 20": _jpeg(20),
}


@dataclass
class Cell:
    """One folder: how many of its images are copies and how they were changed, captions, and what it must come to."""

    name: str
    n: int
    share: float
    change: str | None  # None: the training files themselves
    captions: str = "own"  # own, one, missing (the copies' alone), five (of which one copies)
    repeated: int = 1
    heldout_copies: float = 0.0
    bursts: bool = False  # a tenth of the held-out images are further frames of training pictures

    @property
    def must_be_seen(self) -> bool:
        return self.share >= 0.2 and (self.change is None or self.change in MUST_SEE or self.bursts)


def cells(quick: bool) -> list[Cell]:
    """The table: kinds of copy, shares, captions and sizes."""
    table = [
        Cell("files, one caption", SIZE, 1.0, None, "one"),
        Cell("one of five prompts copies", SIZE, 0.2, "unchanged", "five"),
        Cell("one file", SIZE, 1 / SIZE, None),
        Cell("two files", SIZE, 2 / SIZE, None),
        Cell("captioned copies among others", SIZE, 0.2, "unchanged", "missing"),
        Cell("copies of both sets", SIZE, 0.3, "unchanged", heldout_copies=0.3),
        Cell("three fresh", 3, 0.0, None),
        Cell("one fresh, 500 times", 1, 0.0, None, repeated=500),
        Cell("fresh, one caption", SIZE, 0.0, None, "one"),
    ]
    for name in MUST_SEE if quick else [*MUST_SEE, *OTHERS]:
        for share in (1.0,) if quick else (1.0, 0.2, 0.05):
            table.append(Cell(f"{name}, {share:.0%}", SIZE, share, name, "one" if share == 0.2 else "own"))
    table += [Cell(f"fresh, {n}", n, 0.0, None) for n in ((SIZE,) if quick else (50, SIZE, 400))]
    return table


class Pictures:
    """Three sets of one source. What isn't trained on is dealt out from a seed: nothing tells held-out from fresh."""

    def __init__(self, train: Path, heldout: Path, fresh: Path, seed: int):
        self.generator = np.random.default_rng(seed)
        sets = [[record.path for record in list_images(folder)] for folder in (train, heldout, fresh)]
        self.train, unseen = sets[0], sets[1] + sets[2]
        order = self.generator.permutation(len(unseen))
        dealt = [unseen[i] for i in order]
        self.heldout, self.fresh = dealt[: len(sets[1])], dealt[len(sets[1]) :]

    def some(self, paths: list[Path], count: int) -> list[Path]:
        """So many of them, each once as far as they go."""
        order = self.generator.permutation(len(paths))
        return [paths[order[i % len(paths)]] for i in range(count)]

    def write(self, cell: Cell, folder: Path) -> None:
        """The cell's images and captions."""
        folder.mkdir(parents=True)
        copies, rows = round(cell.share * cell.n), []
        change = {**MUST_SEE, **OTHERS}.get(cell.change or "")
        sources = [(p, True) for p in self.some(self.train, copies)]
        others = round(cell.heldout_copies * cell.n)
        sources += [(p, False) for p in self.some(self.heldout, others)]
        sources += [(p, False) for p in self.some(self.fresh, cell.n - len(sources))]
        for i, (path, is_copy) in enumerate(sources):
            if is_copy and change is None:
                name = f"{i:04d}{path.suffix}"
                shutil.copyfile(path, folder / name)
            else:
                image = load_rgb(path)
                image = change(image) if is_copy and change else image
                name = f"{i:04d}.png"
                image.save(folder / name)
            rows.append({"file_name": name, "text": self._caption(cell, i, is_copy)})
        for k in range(1, cell.repeated):
            shutil.copyfile(folder / rows[0]["file_name"], folder / f"again-{k:04d}.png")
            rows.append({"file_name": f"again-{k:04d}.png", "text": "a photo"})
        rows = [row for row in rows if row["text"] is not None]
        if len(rows) == cell.n * cell.repeated or cell.captions == "missing":
            for row in rows:
                (folder / row["file_name"]).with_suffix(".txt").write_text(row["text"])

    @staticmethod
    def _caption(cell: Cell, i: int, is_copy: bool) -> str | None:
        if cell.captions == "missing":
            return "a photo of sks dog" if is_copy else None
        if cell.captions == "five":
            return "prompt 0" if is_copy else f"prompt {1 + i % 4}"
        return "a photo of sks dog" if cell.captions == "one" else f"picture {i}"


BURSTS = [
    Cell("soft copies, bursts held out", SIZE, 0.2, "another frame", bursts=True),
    Cell("blurred, bursts held out", SIZE, 0.2, "blurred", bursts=True),
]


def run(
    arguments: argparse.Namespace, heldout_size: int | None, seed: int, work: Path, table: list[Cell], bursts: bool = False
) -> list[dict]:
    """All cells of one seed and one size of the held-out set, in one evaluation."""
    pictures = Pictures(arguments.train, arguments.heldout, arguments.fresh, seed)
    heldout = work / "heldout"
    heldout.mkdir(parents=True)
    for path in pictures.heldout[:heldout_size]:
        shutil.copyfile(path, heldout / path.name)
    if bursts:
        for path in pictures.some(pictures.train, len(pictures.heldout) // 9):
            _frame(load_rgb(path)).save(heldout / f"frame-{path.stem}.png")
    flags = []
    for i, cell in enumerate(table):
        pictures.write(cell, work / f"cell-{i}")
        flags.append(f"c{i}={work / f'cell-{i}'}")
    output = work / "report"
    common = ["--train_data_dir", str(arguments.train), "--heldout_data_dir", str(heldout)]
    flags = ["--generated_dir", *flags, *common, "--output_dir", str(output), "--max_excess", str(BUDGET)]
    report = evaluate(evaluation_settings(load_options(MemorizationOptions, flags)))
    assert report is not None, "one process goes through every stage"
    return [_outcome(cell, report["models"][f"c{i}"], heldout_size, seed) for i, cell in enumerate(table)]


def _outcome(cell: Cell, model: ModelFigures, heldout_size: int | None, seed: int) -> dict:
    figures = model["samplers"]["given"]
    copied, contained = figures["copied_share"], figures["contained"]
    assert contained is not None, "copies are always looked for"
    code, _ = decide(model, BUDGET)
    level = model["verdict"]["level"]
    return {
        "cell": cell.name, "seed": seed, "heldout": heldout_size, "truth": cell.share, "n": cell.n,
        "must_be_seen": cell.must_be_seen, "level": level, "exit": code,
        "interval": None if copied is None else [copied["low"], copied["high"]],
        "certain": contained["certain"], "near": contained["near_duplicates"], "text": model["verdict"]["text"],
    }  # fmt: skip


def figures(rows: list[dict]) -> dict:
    """What the table comes to."""
    seen = [row for row in rows if row["must_be_seen"]]
    innocent = [row for row in rows if row["truth"] == 0]
    with_files = [row for row in rows if row["cell"] in ("one file", "two files")]
    judged = [row for row in rows if row["interval"] is not None and (row["truth"] == 0 or row["must_be_seen"])]
    covered = [row["interval"][0] <= row["truth"] <= row["interval"][1] for row in judged]
    contradictions = [
        row
        for row in rows
        if (row["exit"] == 1 and row["level"] != "above")
        or (row["exit"] == 0 and row["level"] != "within" and row["truth"] > BUDGET)
    ]
    unseen = [row for row in rows if not row["must_be_seen"] and row["truth"] >= 0.2]
    return {
        "cells": len(rows),
        "cleared_copiers": sum(row["level"] == "within" or row["exit"] == 0 for row in seen),
        "contradictions": len(contradictions),
        "cleared_of_other_copies": _mean([row["exit"] == 0 for row in unseen]),
        "accused_innocents": _mean([row["level"] == "above" or row["exit"] == 1 for row in innocent]),
        "doubted_innocents": _mean([row["level"] == "unclear" for row in innocent]),
        "coverage_of_shares": _mean(covered),
        "found_when_present": _mean([row["certain"] > 0 for row in with_files]),
    }


def _mean(values: list[bool]) -> float | None:
    return float(np.mean(values)) if values else None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, default=DATA / "finetune")
    parser.add_argument("--heldout", type=Path, default=DATA / "heldout")
    parser.add_argument("--fresh", type=Path, default=DATA / "pretrain")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one seed, fewer cells")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    started, rows = time.perf_counter(), []
    for size in (None,) if arguments.quick else (None, 60):
        for seed in range(1 if arguments.quick else arguments.seeds):
            with tempfile.TemporaryDirectory() as work:
                rows += run(arguments, size, seed, Path(work) / "table", cells(arguments.quick))
                rows += run(arguments, size, seed, Path(work) / "bursts", BURSTS, bursts=True)
    for row in rows:
        size = row["heldout"] or "all"
        print(f"{row['cell']:30s} H {size:>4} {row['truth']:5.0%} {row['level']:8s} {row['exit']} {row['interval']}")
    came_to = figures(rows)
    targets = [target(name, came_to[name], sense, limit) for name, sense, limit in TARGETS if came_to[name] is not None]
    if arguments.json:
        write_record(arguments.json, "verdicts", {**came_to, "rows": rows}, targets, started)
    else:
        print(came_to)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
