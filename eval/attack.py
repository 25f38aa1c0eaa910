"""Attacks on the weights of one model, on training images and held-out ones alike, as an auditor would run them.

python -m eval.attack --pretrained_model_name_or_path BASE [--lora DIR | --unet DIR] --train_data_dir DIR
--heldout_data_dir DIR
    --output_dir OUT [--attack_t 500 700 900] [--attack_modes one_step posterior] [--attack_prompts caption]

noise      an image is noised to timestep t and denoised again; how near does it come back?
denoising  the error of ε̂ on it at t, and the gap between training and held-out images

Images that were not trained on are the control: the figures are how well the two sets can be told apart (AUC, true
positives at 1 % false ones). The base model answers the same questions, since one set may simply be harder. Writes
attack.json; what is there is not done again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eval import metrics
from eval.checkpoints import Checkpoint, check_tuned, hash_weights, model_errors, resolve_base, resolve_device, tuned
from eval.denoise import MODES, Subject, denoising_errors, image_generator, reconstruct
from eval.embed import normalised
from eval.embedders import EMBEDDERS, Embedder, check_embedder, load_embedder
from eval.generate import DTYPES, GenerationOptions
from eval.images import ImageSet, StageError, drop_duplicates, read_folder
from sdxl_ambient.config import OptionError, option, parse_options
from sdxl_ambient.images import ImageError, ImagesMissing, load_rgb
from sdxl_ambient.manifest import differences, read_json, write_json


@dataclass
class AttackOptions(GenerationOptions):
    """What every model is asked."""

    attack_t: list[int] = option([500, 700, 900], "timesteps that images are noised to", minimum=1, maximum=999)
    attack_modes: list[str] = option(["one_step", "posterior"], "how they are denoised", choices=MODES)
    attack_steps: int = option(25, "reverse steps of a posterior sample", minimum=1)
    attack_prompts: str = option("caption", "what the model is told of an image", choices=("caption", "none"))
    attack_images: int = option(128, "images of each set, at most, taken evenly", minimum=2)


def evenly(images: ImageSet, count: int) -> ImageSet:
    """At most ``count`` images, evenly from the set."""
    size = min(count, len(images))
    return images.subset([i * len(images) // size for i in range(size)])


def readable(images: ImageSet) -> tuple[ImageSet, list]:
    """The images that can be opened, and their pictures; the others are listed as excluded."""
    kept, pictures, excluded = [], [], []
    for i, record in enumerate(images.records):
        try:
            pictures.append(load_rgb(record.path))
            kept.append(i)
        except ImageError as error:
            excluded.append({"file": images.name(i), "reason": str(error)})
    return images.subset(kept, excluded), pictures


@torch.no_grad()
def interrogate(
    subject: Subject, embedder: Embedder, images: ImageSet, options: AttackOptions, progress=None
) -> dict[str, np.ndarray]:
    """One set's answers: ``error/T`` mean squared errors and ``MODE/T`` similarities of each image to itself, (n,) each.

    Raises:
        StageError: no usable image in the set.
    """
    schedule, answers = subject.schedule, {}
    images, pictures = readable(images)
    if not pictures:
        raise StageError(f"{images.folder}: no image left to attack with ({len(images.excluded)} left out)")
    for start in range(0, len(pictures), options.batch_size):
        rows = range(start, min(start + options.batch_size, len(pictures)))
        x_0 = subject.encode([pictures[i] for i in rows]).to(subject.pipe.device)
        own = _embed(embedder, subject.decode(x_0))
        prompts = [images.records[i].caption if options.attack_prompts == "caption" else None for i in rows]
        denoise = subject.denoiser(prompts)
        for t in options.attack_t:
            generators = [image_generator(images.hashes[i], t, options.seed) for i in rows]
            errors = denoising_errors(denoise, schedule, x_0, t, generators)
            answers.setdefault(f"error/{t}", []).append(errors.cpu().numpy())
            for mode in options.attack_modes:
                generators = [image_generator(images.hashes[i], t, options.seed) for i in rows]
                back = reconstruct(denoise, schedule, x_0, t, generators, mode, options.attack_steps)
                similarity = (_embed(embedder, subject.decode(back)) * own).sum(1)
                answers.setdefault(f"{mode}/{t}", []).append(similarity)
        if progress:
            progress(len(rows))
    return {name: np.concatenate(parts) for name, parts in answers.items()}


def _embed(embedder: Embedder, pictures: list) -> np.ndarray:
    return normalised(embedder.encode(torch.stack([embedder.prepare(p) for p in pictures])).numpy())


def attack_figures(members: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> dict:
    """How well training images can be told from held-out ones by each answer: AUC and TPR at 1 % FPR, with the sets' means.

    For errors a lower one speaks for membership; for similarities a higher one does.
    """
    figures = {}
    for name in members:
        sign = -1.0 if name.startswith("error/") else 1.0
        one, other = sign * members[name], sign * others[name]
        figures[name] = {
            "n_train": len(one),
            "n_heldout": len(other),
            "mean_train": float(members[name].mean()),
            "mean_heldout": float(others[name].mean()),
            "auc": metrics.roc_auc(one, other),
            "tpr_at_1_fpr": metrics.tpr_at_fpr(one, other, 0.01),
        }
    return figures


def attack(
    options: AttackOptions, checkpoint: Checkpoint, train: ImageSet, heldout: ImageSet, embedder: Embedder, folder: Path
) -> dict:
    """Run every attack on one model, or read what is there of the same question. Writes ``folder``/attack.json.

    Raises:
        StageError: ``folder`` has the answers to another question.
    """
    train, heldout = evenly(train, options.attack_images), evenly(heldout, options.attack_images)
    settings = _settings(options, checkpoint, train, heldout, embedder)
    path = Path(folder) / "attack.json"
    if path.exists():
        there = read_json(path)
        if changed := differences(there["settings"], settings):
            raise StageError(f"{path} was made with other settings: {'; '.join(changed)}; give another --output_dir")
        return there["figures"]
    subject = _open(options, checkpoint)
    with tqdm(total=len(train) + len(heldout), unit="image", desc=f"attack {checkpoint.name}", delay=2) as bar:
        sets = [interrogate(subject, embedder, images, options, bar.update) for images in (train, heldout)]
    figures = attack_figures(*sets)
    write_json(path, {"settings": settings, "figures": figures})
    return figures


def _open(options: AttackOptions, checkpoint: Checkpoint) -> Subject:
    from sdxl_ambient.pipeline import load_pipeline

    pipe = load_pipeline(
        str(resolve_base(options.pretrained_model_name_or_path, options.revision, options.variant)),
        lora=checkpoint.lora,
        lora_scale=options.lora_scale,
        unet=checkpoint.unet,
        vae=options.pretrained_vae_model_name_or_path,
        dtype=DTYPES[options.dtype],
        device=resolve_device(options.device),
        variant=options.variant,
    )
    return Subject(pipe, options.resolution or pipe.default_sample_size * pipe.vae_scale_factor)


def _settings(
    options: AttackOptions, checkpoint: Checkpoint, train: ImageSet, heldout: ImageSet, embedder: Embedder
) -> dict:
    names = ("attack_t", "attack_modes", "attack_steps", "attack_prompts", "resolution", "seed", "dtype", "lora_scale")
    base = resolve_base(options.pretrained_model_name_or_path, options.revision, options.variant)
    vae = options.pretrained_vae_model_name_or_path
    return {
        **{name: getattr(options, name) for name in names},
        "base_weights": hash_weights(base, "base"),
        "vae_weights": hash_weights(Path(vae), "vae") if vae and Path(vae).is_dir() else vae,
        "lora_weights": hash_weights(checkpoint.lora, "lora") if checkpoint.lora else None,
        "unet_weights": hash_weights(checkpoint.unet, "unet") if checkpoint.unet else None,
        "embedder": embedder.key,
        "train": train.hashes,
        "heldout": heldout.hashes,
    }


# -- command line ------------------------------------------------------------------


@dataclass
class Options(AttackOptions):
    lora: str | None = option(None, "LoRA: directory or .safetensors file", metavar="PATH")
    unet: str | None = option(None, "fully fine-tuned UNet: directory", metavar="DIR")
    train_data_dir: str | None = option(None, "the fine-tuning set", metavar="DIR")
    heldout_data_dir: str | None = option(None, "images of the same source that were not trained on", metavar="DIR")
    caption_column: str = option("text", "key of the caption in metadata.jsonl")
    embedder: str = option("pixel", "what similarity is measured in", choices=EMBEDDERS)
    embedder_weights: str | None = option(None, "local path or Hub id of the embedder's weights", metavar="PATH_OR_ID")
    output_dir: str | None = option(None, "folder to write to", metavar="DIR")

    def validate(self) -> None:
        for name in ("pretrained_model_name_or_path", "train_data_dir", "heldout_data_dir", "output_dir"):
            if getattr(self, name) is None:
                raise OptionError(f"--{name}: required")
        self.check_generation()
        check_tuned(self)
        try:
            check_embedder(self.embedder, self.embedder_weights)
        except StageError as error:
            raise OptionError(str(error)) from None


def main(argv: list[str] | None = None) -> int:
    options = parse_options(Options, argv, prog="eval.attack", description=__doc__)
    try:
        train = drop_duplicates(read_folder(options.train_data_dir, options.caption_column))
        heldout = drop_duplicates(read_folder(options.heldout_data_dir, options.caption_column), train)
        checkpoint = tuned(options)
        embedder = load_embedder(options.embedder, options.embedder_weights, resolve_device(options.device))
        figures = attack(options, checkpoint, train, heldout, embedder, Path(options.output_dir))
    except (OptionError, StageError, ImagesMissing, OSError, *model_errors()) as error:
        print(f"eval.attack: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for name, one in figures.items():
        print(f"{name}: AUC {one['auc']:.3f}, TPR at 1 % FPR {one['tpr_at_1_fpr']:.3f}")
    print(Path(options.output_dir) / "attack.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
