"""The commands that faults are injected into, on six pictures of the miniature, and what each reads."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.record import ROOT

BASE = ROOT / "miniature/pipeline"
PICTURES = 6
LOW_NOISE = ("skip", "consistency", "restore", "clean")
Main = Callable[[list[str]], int]


@dataclass(frozen=True)
class Command:
    """One command line, {case} in it the folder of one fault.

    ``inputs``: what it reads of the prepared folder, beside the pictures. ``codes``: how it ends undisturbed.
    """

    name: str
    module: str
    flags: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    codes: tuple[int, ...] = (0,)

    def argv(self, case: Path) -> list[str]:
        return [flag.format(case=case) for flag in self.flags]

    @property
    def keeps_key(self) -> bool:
        return "none" not in self.flags


def _flags(**options: object) -> tuple[str, ...]:
    return tuple(str(word) for name, value in options.items() for word in (f"--{name}", value))


def all_commands() -> list[Command]:
    base, out, images = BASE, "{case}/out", "{case}/images"
    encode = _flags(pretrained_model_name_or_path=base, train_data_dir=images, output_dir=out, resolution=64, shard_size=2)
    train = dict(
        pretrained_model_name_or_path=base, train_data_dir=images, output_dir=out, resolution=64, shard_size=2, rank=2,
        train_batch_size=2, max_train_steps=3, checkpointing_steps=1, report_to="none", resume_from_checkpoint="latest",
    )  # fmt: skip
    more = {"restore": {"restore_steps": 2}, "consistency": {"consistency_steps": 1}}
    drawing = dict(pretrained_model_name_or_path=base, resolution=64, num_inference_steps=1, batch_size=2)
    sets = dict(train_data_dir=images, heldout_data_dir="{case}/other", embedder="pixel")
    generated = "given={case}/drawn"
    return [
        Command("encode", "sdxl_ambient.latents", encode),
        Command("encode, no key", "sdxl_ambient.latents", (*encode, "--noise_key", "none")),
        *(
            Command(f"train, {low}", "train_sdxl_ambient", _flags(**train, low_noise=low, **more.get(low, {})))
            for low in LOW_NOISE
        ),
        Command("generate", "eval.generate", _flags(**drawing, train_data_dir=images, output_dir=out, sampler="full")),
        Command("embed", "eval.embed", _flags(image_dir=images, embedder="pixel", output_dir=out)),
        Command(
            "attack", "eval.attack",
            _flags(**drawing, **sets, output_dir=out, attacks="noise", attack_t=500, attack_modes="one_step"), ("other",),
        ),
        Command(
            "report", "eval.memorization", _flags(**sets, generated_dir=generated, output_dir=out),
            ("other", "drawn"), (0, 3),
        ),
        Command(
            "loop", "sdxl_ambient.loop",
            _flags(pretrained_model_name_or_path=base, latents_dir="{case}/store", t_n=300, steps=1, output_dir=out),
            ("store",),
        ),
    ]  # fmt: skip


def main_of(module: str) -> Main:
    """The ``main`` of a command's module."""
    place = {"sdxl_ambient.loop": "sdxl_ambient.loop.__main__"}.get(module, module)
    return importlib.import_module(place).main


def copy_pictures(folder: Path, first: int, count: int) -> None:
    """Some emoji with their captions."""
    source = ROOT / "miniature/data/finetune"
    rows = (source / "metadata.jsonl").read_text().splitlines()[first : first + count]
    folder.mkdir(parents=True)
    for row in rows:
        shutil.copy(source / json.loads(row)["file_name"], folder)
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
