"""How much of a fine-tuning set does a model reproduce? Runs the stages in order; a second run redoes nothing.

python -m eval.memorization --pretrained_model_name_or_path BASE --lora [NAME=]DIR … --train_data_dir DIR
    --heldout_data_dir DIR --output_dir OUT [--samplers full hybrid] [--sampler_t_n 500]
python -m eval.memorization --generated_dir [NAME=]DIR … --train_data_dir DIR --heldout_data_dir DIR --output_dir OUT

OUT gets generated/MODEL/SAMPLER/, embeddings/, attacks/, controls.json, report.json and index.html.
Exit codes: 0 within the budget (or none given), 1 over the memorisation budget (--max_excess), 2 error, 3 too few held-out
images to calibrate (the report then has descriptive figures only).
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eval.attack import AttackOptions, attack
from eval.checkpoints import Checkpoint, check_checkpoint, model_errors, resolve_device
from eval.controls import MOST, TRANSFORMS, planted, vae_round_trip
from eval.duplicates import drop_near_duplicates, fingerprints
from eval.embed import Embedded, embed_images
from eval.embedders import EMBEDDERS, Embedder, check_embedder, load_embedder
from eval.generate import (
    SAMPLERS,
    Draw,
    captions_of,
    generate,
    open_vae,
    plan,
    read_prompts,
    sampler_levels,
)
from eval.images import ImageSet, StageError, drop_duplicates, read_folder
from eval.report import write_html
from eval.summary import (
    control_figures,
    make_references,
    model_figures,
    over_budget,
    sampler_figures,
    threshold_figures,
    verdict,
)
from sdxl_ambient.config import OptionError, option, parse_options
from sdxl_ambient.images import ImagesMissing
from sdxl_ambient.manifest import environment, hash_tensors, read_json, write_json

SCHEMA_VERSION = 2
BASE = "base"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass
class Options(AttackOptions):
    lora: list[str] = option([], "LoRAs to evaluate, each [NAME=]PATH", metavar="[NAME=]PATH")
    unet: list[str] = option([], "fully fine-tuned UNets to evaluate, each [NAME=]DIR", metavar="[NAME=]DIR")
    generated_dir: list[str] = option([], "folders of images made elsewhere, each [NAME=]DIR", metavar="[NAME=]DIR")
    samplers: list[str] = option(["full"], "how to sample each LoRA and UNet", choices=SAMPLERS)
    skip_attacks: bool = option(False, "leave out the attacks on the weights")
    skip_base: bool = option(False, "leave out the base model, which is a control")
    train_data_dir: str | None = option(None, "the fine-tuning set", metavar="DIR")
    heldout_data_dir: str | None = option(None, "images of the same source that were not trained on", metavar="DIR")
    caption_column: str = option("text", "key of the caption in metadata.jsonl")
    embedder: str = option("pixel", "what similarity is measured in", choices=EMBEDDERS)
    embedder_weights: str | None = option(None, "local path or Hub id of the embedder's weights", metavar="PATH_OR_ID")
    embedding_batch_size: int = option(32, "images embedded at once", minimum=1)
    alpha: float = option(0.02, "share of unrelated images that may exceed the threshold", above=0.0, maximum=0.5)
    confidence: float = option(0.95, "of the intervals", minimum=0.5, maximum=0.9999)
    max_excess: float | None = option(
        None, "budget: exit with 1 where a model's copied share, whole interval, lies above this", minimum=0, maximum=1
    )
    near_duplicates: str = option(
        "drop", "held-out and training images that show the same picture as a training image", choices=("drop", "keep")
    )
    output_dir: str | None = option(None, "folder to write to", metavar="DIR")

    def validate(self) -> None:
        for name in ("train_data_dir", "heldout_data_dir", "output_dir"):
            if getattr(self, name) is None:
                raise OptionError(f"--{name}: required")
        if self.pretrained_model_name_or_path is None and (self.lora or self.unet or not self.generated_dir):
            raise OptionError("--pretrained_model_name_or_path: required, unless images are given with --generated_dir")
        self.check_generation()
        for name in ("train_data_dir", "heldout_data_dir"):
            if not Path(getattr(self, name)).is_dir():
                raise OptionError(f"--{name}: {getattr(self, name)!r} is not a folder")
        for checkpoint in self.checkpoints():
            for name in ("lora", "unet"):
                if getattr(checkpoint, name):
                    check_checkpoint(name, getattr(checkpoint, name))
        for folder in self.given().values():
            if not folder.is_dir():
                raise OptionError(f"--generated_dir: {str(folder)!r} is not a folder")
        if not self.checkpoints() and not self.given():
            raise OptionError("--skip_base: leaves nothing to evaluate; give --lora, --unet or --generated_dir")
        self._check_folders()
        try:
            check_embedder(self.embedder, self.embedder_weights)
        except StageError as error:
            raise OptionError(str(error)) from None

    def checkpoints(self) -> list[Checkpoint]:
        """The models to draw from, the base first. Raises OptionError for names that clash or can't be folder names."""
        if self.pretrained_model_name_or_path is None:
            return []
        found = [] if self.skip_base else [Checkpoint(BASE)]
        for kind in ("lora", "unet"):
            for value in getattr(self, kind):
                name, path = _named(kind, value)
                found.append(Checkpoint(name, **{kind: path}))
        _check_unique([BASE, *(c.name for c in found if c.lora or c.unet), *self.given()])
        return found

    def given(self) -> dict[str, Path]:
        """The folders of images that are there already, by name."""
        pairs = [_named("generated_dir", value) for value in self.generated_dir]
        _check_unique([name for name, _ in pairs])
        return dict(pairs)

    def _check_folders(self) -> None:
        train, heldout, out = (Path(p).resolve() for p in (self.train_data_dir, self.heldout_data_dir, self.output_dir))
        if train == heldout:
            raise OptionError(f"--heldout_data_dir: {self.heldout_data_dir!r} is the training set; nothing is held out")
        for name, folder in [("train_data_dir", train), ("heldout_data_dir", heldout)]:
            if out == folder or folder in out.parents:
                # Generated images would be read as data the next time.
                raise OptionError(f"--output_dir: {self.output_dir!r} lies inside --{name}; give a folder outside it")
        existing = next(p for p in (out, *out.parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise OptionError(f"--output_dir: {self.output_dir!r} can't be written to ({existing} is not a writable folder)")


def _named(kind: str, value: str) -> tuple[str, Path]:
    """ "NAME=PATH", or a path that gives its own name."""
    name, equals, path = value.partition("=")
    if not equals:
        name, path = Path(value).resolve().name.removesuffix(".safetensors"), value
    if not _NAME.fullmatch(name) or not path:
        raise OptionError(f"--{kind}: {value!r} must be NAME=PATH, the name of letters, digits, '.', '_' and '-'")
    return name, Path(path)


def _check_unique(names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise OptionError(f"two models are called {name!r}; name them apart with NAME=PATH")


# -- stages ------------------------------------------------------------------------


def plan_models(options: Options) -> tuple[dict[str, dict], list[Draw]]:
    """Each model's samplers with their noise levels, and the images to draw: all that can be refused before loading."""
    checkpoints = options.checkpoints()
    levels = {
        c.name: sampler_levels(c, options.samplers if c.name != BASE else ["full"], options.sampler_t_n) for c in checkpoints
    }
    if not checkpoints:
        return levels, []
    if options.prompts_file:
        prompts = read_prompts(options.prompts_file)
    else:
        prompts = captions_of(options.train_data_dir, options.caption_column)
    return levels, plan(prompts, options.seed, options.num_images, options.images_per_prompt)


def draw_all(options: Options, levels: dict[str, dict], draws: list[Draw]) -> dict[str, tuple[dict, dict]]:
    """Every model's images: name → (what it is, sampler → (folder, t_n)). Draws what is missing."""
    models = {}
    for c in options.checkpoints():
        folders = generate(options, c, levels[c.name], draws, Path(options.output_dir) / "generated" / c.name)
        about = {
            "kind": "lora" if c.lora else ("unet" if c.unet else "base"),
            "path": str(c.lora or c.unet or options.pretrained_model_name_or_path),
            "trained_t_n": c.t_n(),
        }
        models[c.name] = (about, {s: (folder, levels[c.name][s]) for s, folder in folders.items()})
    for name, folder in options.given().items():
        models[name] = ({"kind": "images", "path": str(folder), "trained_t_n": None}, {"given": (folder, None)})
    return models


def embed(images: ImageSet, embedder: Embedder, options: Options) -> Embedded:
    """Features of a set, from the cache where they are there."""
    with tqdm(total=len(images), unit="image", desc=f"embed {images.folder.name} ({embedder.name})", delay=2) as bar:
        cache = Path(options.output_dir) / "embeddings"
        return embed_images(images, embedder, cache, options.embedding_batch_size, bar.update)


def read_data(options: Options) -> tuple[ImageSet, ImageSet]:
    """The fine-tuning and the held-out set, without duplicates within or across: equal files, then near-duplicates."""
    train = drop_duplicates(read_folder(options.train_data_dir, options.caption_column))
    heldout = drop_duplicates(drop_duplicates(read_folder(options.heldout_data_dir, options.caption_column)), train)
    if options.near_duplicates == "drop":
        with tqdm(total=len(train) + len(heldout), unit="image", desc="near-duplicates", delay=2) as bar:
            prints = fingerprints(train, bar.update)
            heldout = drop_near_duplicates(heldout, fingerprints(heldout, bar.update), train, prints)
            train = drop_near_duplicates(train, prints)
    if not len(heldout):
        raise StageError(f"--heldout_data_dir: every image of {options.heldout_data_dir!r} is in the training set too")
    return train, heldout


def attack_all(options: Options, train: ImageSet, heldout: ImageSet, embedder: Embedder) -> dict[str, dict]:
    """Each model's answers to the attacks; none for folders of images."""
    if options.skip_attacks:
        return {}
    folder = Path(options.output_dir) / "attacks"
    return {c.name: attack(options, c, train, heldout, embedder, folder / c.name) for c in options.checkpoints()}


def plant(options: Options, train: Embedded, embedder: Embedder) -> dict:
    """Similarities of known copies of training images; through the model's VAE too, where there is a model.

    Kept in ``controls.json`` for the next run that asks the same.
    """
    transforms, asked = dict(TRANSFORMS), {"embedder": embedder.key, "train": train.images.hashes, "most": MOST, "vae": None}
    if options.pretrained_model_name_or_path is not None:
        vae, resolution = open_vae(options)
        transforms["vae"] = vae_round_trip(vae, resolution)
        asked["vae"] = {"weights": hash_tensors(vae.state_dict()), "resolution": resolution}
    path = Path(options.output_dir) / "controls.json"
    if path.exists() and (there := read_json(path))["settings"] == asked:
        return {name: np.array(values, dtype=np.float32) for name, values in there["planted"].items()}
    with tqdm(total=min(len(train), MOST), unit="image", desc="plant copies", delay=2) as bar:
        found = planted(train, embedder, transforms, options.embedding_batch_size, bar.update)
    write_json(path, {"settings": asked, "planted": {name: values.tolist() for name, values in found.items()}})
    return found


def evaluate(options: Options) -> dict:
    """Run every stage and return the report."""
    levels, draws = plan_models(options)
    train_images, heldout_images = read_data(options)
    embedder = load_embedder(options.embedder, options.embedder_weights, resolve_device(options.device))
    pooled = load_embedder("pooled_pixels")
    models = draw_all(options, levels, draws)
    train, heldout = embed(train_images, embedder, options), embed(heldout_images, embedder, options)
    references = make_references(
        train,
        heldout,
        embed(train_images, pooled, options),
        embed(heldout_images, pooled, options),
        options.alpha,
        options.confidence,
        options.embedder,
        plant(options, train, embedder),
    )
    entries = {}
    for name, (about, folders) in models.items():
        samplers = {}
        for sampler, (folder, t_n) in folders.items():
            images = read_folder(folder)
            figures = sampler_figures(embed(images, embedder, options), embed(images, pooled, options), references)
            samplers[sampler] = {"folder": _relative(folder, options.output_dir), "t_n": t_n, **figures}
        entries[name] = model_figures(samplers, about)
    attacks = attack_all(options, train.images, heldout.images, embedder)
    thresholds = threshold_figures(references)
    for name, model in entries.items():
        model["attacks"] = attacks.get(name)
        model["verdict"] = verdict(name, model, thresholds, entries.get(BASE) if name != BASE else None)
    return {
        "schema_version": SCHEMA_VERSION,
        "environment": environment(),
        "settings": _settings(options),
        "embedder": embedder.describe(),
        "quality_features": pooled.describe(),
        "data": {"train": _data(train), "heldout": _data(heldout)},
        "threshold": thresholds,
        "controls": control_figures(references),
        "models": entries,
    }


def _settings(options: Options) -> dict:
    names = (
        "num_inference_steps",
        "guidance_scale",
        "resolution",
        "seed",
        "dtype",
        "lora_scale",
        "samplers",
        "prompts_file",
        "near_duplicates",
        "max_excess",
        "attack_prompts",
        "attack_steps",
    )
    return {name: getattr(options, name) for name in names}


def _data(embedded: Embedded) -> dict:
    images = embedded.images
    return {"folder": str(images.folder), "n_images": len(images), "excluded": images.excluded}


def _relative(folder: Path, root: str) -> str:
    """Relative to the report where it lies below it, so that the report can be moved as a whole."""
    folder, base = Path(folder).resolve(), Path(root).resolve()
    return folder.relative_to(base).as_posix() if base in folder.parents else str(folder)


def main(argv: list[str] | None = None) -> int:
    options = parse_options(Options, argv, prog="eval.memorization", description=__doc__)
    try:
        report = evaluate(options)
        write_json(Path(options.output_dir) / "report.json", report)
        page = write_html(report, options.output_dir)
    except (OptionError, StageError, ImagesMissing, OSError, *model_errors()) as error:
        print(f"eval.memorization: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for name, model in report["models"].items():
        print(f"{name}: {model['verdict']['text']}")
    print(page)
    if report["threshold"]["value"] is None:
        return 3
    over = [n for n, m in report["models"].items() if options.max_excess is not None and over_budget(m, options.max_excess)]
    if over:
        print(f"Over the budget of {options.max_excess:.1%} copies: {', '.join(over)}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
