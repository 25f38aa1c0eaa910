"""Attacks on the weights of one model, on training images and held-out ones alike, as an auditor would run them.

python -m eval.attack --pretrained_model_name_or_path BASE [--lora DIR | --unet DIR] --train_data_dir DIR
--heldout_data_dir DIR
    --output_dir OUT [--attacks noise mask magnitude] [--attack_t 500 700 900] [--attack_modes one_step posterior]
    [--attack_prompts caption] [--mask_share 0.5]

noise      an image is noised to timestep t and denoised again: the error of ε̂ at t, and how near the image comes back
mask       a square in the middle of an image is cut out and inpainted: how near is that to what was there?
magnitude  how much an image's caption moves the predictions while an image is drawn for it

Images that were not trained on are the control: the figures are how well the two sets can be told apart (AUC, true
positives at 1 % false ones). The base model answers the same questions, since one set may simply be harder. Writes
attack.json, every answer and the figures; what is there is not done again. Under accelerate launch or torchrun the images
are shared over the processes.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from eval import processes
from eval.checkpoints import Checkpoint, check_tuned, hash_weights, model_errors, resolve_base, resolve_device, tuned
from eval.denoise import MODES, Subject, conditional_magnitude, denoising_errors, image_generator, reconstruct
from eval.embed import normalised
from eval.embedders import EMBEDDERS, Embedder, check_embedder, load_embedder
from eval.generate import DTYPES, GenerationOptions
from eval.images import ImageSet, StageError, drop_duplicates, read_folder
from eval.inpaint import hole, inpaint
from eval.membership import SETS, Answers, attack_figures
from sdxl_ambient.config import OptionError, option, parse_options
from sdxl_ambient.images import ImageError, ImagesMissing, load_rgb
from sdxl_ambient.manifest import differences, hash_json, read_json, write_json
from sdxl_ambient.randomness import Randomness

# -- one batch's answers ----------------------------------------------------------


@dataclass
class Batch:
    """Some images of one set, with what several attacks need of them."""

    subject: Subject
    embedder: Embedder
    images: ImageSet
    pictures: list[Image.Image]

    @cached_property
    def x_0(self) -> torch.Tensor:
        """Latents (n, 4, h, w) on the model's device."""
        return self.subject.encode(self.pictures).to(self.subject.pipe.device)

    @cached_property
    def sources(self) -> list[Image.Image]:
        """The pictures after the VAE's round trip, the nearest that the model can come to them."""
        return self.subject.decode(self.x_0)

    @cached_property
    def source_features(self) -> np.ndarray:
        return self.embed(self.sources)

    def embed(self, pictures: list[Image.Image]) -> np.ndarray:
        """Unit vectors (n, d)."""
        return normalised(self.embedder.encode(torch.stack([self.embedder.prepare(p) for p in pictures])).numpy())

    def prompts(self, options: AttackOptions) -> list[str | None]:
        return [record.caption if options.attack_prompts == "caption" else None for record in self.images.records]

    def generators(self, t: int, options: AttackOptions) -> list[torch.Generator]:
        return [image_generator(digest, t, options.seed) for digest in self.images.hashes]


def noise_attack(batch: Batch, options: AttackOptions) -> Answers:
    """``error/T`` mean squared errors of ε̂ and ``MODE/T`` similarities of each image to itself, (n,) each."""
    schedule, answers = batch.subject.schedule, {}
    denoise = batch.subject.denoiser(batch.prompts(options))
    for t in options.attack_t:
        errors = denoising_errors(denoise, schedule, batch.x_0, t, batch.generators(t, options))
        answers[f"error/{t}"] = errors.cpu().numpy()
        for mode in options.attack_modes:
            generators = batch.generators(t, options)
            back = reconstruct(denoise, schedule, batch.x_0, t, generators, mode, options.attack_steps)
            similarity = batch.embed(batch.subject.decode(back)) * batch.source_features
            answers[f"{mode}/{t}"] = similarity.sum(1)
    return answers


def mask_attack(batch: Batch, options: AttackOptions) -> Answers:
    """``mask`` similarities of what the hole was filled with to what was there after the VAE's round trip, (n,)."""
    subject = batch.subject
    box = hole(subject.resolution, options.mask_share, subject.pipe.vae_scale_factor)
    squares = [subject.square(picture) for picture in batch.pictures]
    # All of the hole is noise at first, as an image is at the last timestep.
    generators = batch.generators(subject.schedule.num_timesteps - 1, options)
    how = dict(steps=options.attack_steps, guidance_scale=options.guidance_scale)
    filled = inpaint(subject, squares, batch.prompts(options), generators, box, **how)
    patches, own = ([picture.crop(box) for picture in pictures] for pictures in (filled, batch.sources))
    return {"mask": (batch.embed(patches) * batch.embed(own)).sum(1)}


def magnitude_attack(batch: Batch, options: AttackOptions) -> Answers:
    """``magnitude`` of the images that have a caption, (n,); nothing where none has one."""
    rows = [i for i, record in enumerate(batch.images.records) if record.caption]
    if not rows:
        return {}
    subject, images = batch.subject, batch.images.subset(rows)
    generators = [image_generator(d, subject.schedule.num_timesteps - 1, options.seed) for d in images.hashes]
    like = torch.empty(len(rows), *subject.latent_shape, device=subject.pipe.device)
    told, untold = (subject.denoiser(p) for p in ([r.caption for r in images.records], [None] * len(rows)))
    noise = Randomness(generators, len(rows)).normal(like)
    how = dict(steps=options.attack_steps, guidance_scale=options.guidance_scale)
    return {"magnitude": conditional_magnitude(told, untold, subject.schedule, noise, **how).cpu().numpy()}


ATTACKS: dict[str, Callable] = {"noise": noise_attack, "mask": mask_attack, "magnitude": magnitude_attack}


@dataclass
class AttackOptions(GenerationOptions):
    """What every model is asked."""

    attacks: list[str] = option(list(ATTACKS), "how the weights are asked", choices=tuple(ATTACKS))
    attack_t: list[int] = option([500, 700, 900], "timesteps that images are noised to", minimum=1, maximum=999)
    attack_modes: list[str] = option(["one_step", "posterior"], "how they are denoised", choices=MODES)
    attack_steps: int = option(25, "steps of a posterior sample, of inpainting and of the magnitude", minimum=1)
    attack_prompts: str = option("caption", "what the model is told of an image", choices=("caption", "none"))
    attack_images: int = option(128, "images of each set, at most, taken evenly", minimum=2)
    mask_share: float = option(0.5, "side of the hole of the mask attack over the image's", above=0.0)

    def check_generation(self) -> None:
        super().check_generation()
        if not self.attacks:
            raise OptionError(f"--attacks: give at least one of {', '.join(ATTACKS)}")
        if self.mask_share >= 1:
            raise OptionError(f"--mask_share: {self.mask_share} is not below 1")


# -- both sets' answers -----------------------------------------------------------


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
def interrogate(subject: Subject, embedder: Embedder, images: ImageSet, options: AttackOptions) -> tuple[int, Answers]:
    """What ``options.attacks`` find on one batch of images: how many could be opened, and arrays (n,) by name."""
    images, pictures = readable(images)
    answers: Answers = {}
    if pictures:
        batch = Batch(subject, embedder, images, pictures)
        for name in dict.fromkeys(options.attacks):
            answers.update(ATTACKS[name](batch, options))
    return len(pictures), answers


def interrogate_sets(
    subject: Subject,
    embedder: Embedder,
    sets: dict[str, ImageSet],
    options: AttackOptions,
    name: str = "",
    parts: Path | None = None,
) -> dict[str, Answers]:
    """Each set's answers, from all processes: float64 arrays in the order of the images, the same in every process.

    Batches are made before any image is opened, so that neither the processes nor an unreadable image change who shares a
    batch. Attacks that one of the sets gave no answer to are left out of all. Each batch's answers are kept in the folder
    ``parts``, where an interrupted run finds them again; it belongs to one question.

    Raises:
        StageError: no image of a set can be opened, no attack can be run on all sets, or an answer isn't finite.
    """
    batches = [(key, i, one) for key, s in sets.items() for i, one in enumerate(_batches(s, options.batch_size))]
    mine, done = processes.share(batches), []
    total = sum(len(images) for *_, images in mine)
    with tqdm(total=total, unit="image", desc=f"attack {name}", delay=2, disable=not processes.is_main()) as bar:
        for key, i, images in mine:
            path = parts / f"{key}-{options.batch_size}-{i}.json" if parts else None
            done.append((key, *_kept(path, lambda one=images: interrogate(subject, embedder, one, options))))
            bar.update(len(images))
    done = processes.collect(done)
    for key, images in sets.items():
        if not (kept := sum(count for one, count, _ in done if one == key)):
            raise _none_left(images, len(images) - kept)
    return _combine(done, sets)


def _kept(path: Path | None, ask: Callable[[], tuple[int, Answers]]) -> tuple[int, Answers]:
    """What ``path`` holds, or what is asked now and kept there."""
    if path is not None and path.exists():
        there = read_json(path)
        return there["count"], {name: np.array(values, np.float32) for name, values in there["answers"].items()}
    count, answers = ask()
    if path is not None:
        write_json(path, {"count": count, "answers": {name: values.tolist() for name, values in answers.items()}})
    return count, answers


def _batches(images: ImageSet, size: int) -> list[ImageSet]:
    return [images.subset(range(i, min(i + size, len(images)))) for i in range(0, len(images), size)]


def _none_left(images: ImageSet, unreadable: int = 0) -> StageError:
    left_out = len(images.excluded) + unreadable
    return StageError(f"{images.folder}: no image left to attack with ({left_out} left out)")


def _combine(done: list[tuple[str, int, Answers]], sets: dict[str, ImageSet]) -> dict[str, Answers]:
    found: dict[str, dict[str, list]] = {key: {} for key in sets}
    for key, _, answers in done:
        for name, values in answers.items():
            found[key].setdefault(name, []).append(values)
    names = [n for n in found[next(iter(sets))] if all(n in answers for answers in found.values())]
    if not names:
        raise StageError("--attacks: magnitude needs captions, and one of the sets has none")
    joined = {key: {n: np.concatenate(answers[n]).astype(np.float64) for n in names} for key, answers in found.items()}
    for key, answers in joined.items():
        if broken := [name for name, values in answers.items() if not np.isfinite(values).all()]:
            raise StageError(f"{sets[key].folder}: {broken[0]} isn't finite; in float16 SDXL needs another VAE")
    return joined


# -- one model --------------------------------------------------------------------


def attack(
    options: AttackOptions, checkpoint: Checkpoint, train: ImageSet, heldout: ImageSet, embedder: Embedder, folder: Path
) -> dict[str, Answers]:
    """Every attack's answers on one model, asked or read from where they are: ``{"train": {name: (n,)}, "heldout": …}``.

    Names are ``error/T``, ``MODE/T``, ``mask`` and ``magnitude``; figures are made of them by :func:`attack_figures`. All
    processes call it, share the batches and get the same; the main one writes ``folder``/attack.json.

    Raises:
        StageError: ``folder`` has the answers to another question, a set has no usable image, or an answer isn't finite.
    """
    sets = {key: images.thinned(options.attack_images) for key, images in zip(SETS, (train, heldout), strict=True)}
    settings = attack_settings(options, checkpoint, sets["train"], sets["heldout"], embedder)
    path = Path(folder) / "attack.json"
    # The main process looks, for all: another could look when the file is already written, and miss the work to share.
    there = processes.collect([read_json(path) if processes.is_main() and path.exists() else None])[0]
    if there is not None:
        if changed := differences(there["settings"], settings):
            raise StageError(f"{path} was made with other settings: {'; '.join(changed)}; give another --output_dir")
        return {key: {name: np.array(values) for name, values in there["answers"][key].items()} for key in SETS}
    for images in sets.values():
        if not len(images):
            raise _none_left(images)
    parts = Path(folder) / f"parts-{hash_json(settings)[:16]}"
    answers = interrogate_sets(_open(options, checkpoint), embedder, sets, options, checkpoint.name, parts)
    if processes.is_main():
        lists = {key: {name: values.tolist() for name, values in one.items()} for key, one in answers.items()}
        figures = attack_figures(answers["train"], answers["heldout"])
        write_json(path, {"settings": settings, "answers": lists, "figures": figures})
        shutil.rmtree(parts, ignore_errors=True)
    processes.wait()
    return answers


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


def attack_settings(
    options: AttackOptions, checkpoint: Checkpoint, train: ImageSet, heldout: ImageSet, embedder: Embedder
) -> dict:
    """Everything that determines the answers, as attack.json keeps it; not how the work is cut into batches."""
    sets, told = {"train": train, "heldout": heldout}, options.attack_prompts == "caption" or "magnitude" in options.attacks
    base = resolve_base(options.pretrained_model_name_or_path, options.revision, options.variant)
    vae = options.pretrained_vae_model_name_or_path
    return {
        **{name: getattr(options, name) for name in _deciding(options)},
        "attacks": sorted(set(options.attacks)),
        "lora_scale": options.lora_scale if checkpoint.lora else None,
        "device": torch.device(resolve_device(options.device)).type,
        "base_weights": hash_weights(base, "base"),
        "vae_weights": hash_weights(Path(vae), "vae") if vae and Path(vae).is_dir() else vae,
        "lora_weights": hash_weights(checkpoint.lora, "lora") if checkpoint.lora else None,
        "unet_weights": hash_weights(checkpoint.unet, "unet") if checkpoint.unet else None,
        "embedder": embedder.key,
        **{key: images.hashes for key, images in sets.items()},
        "captions": {key: hash_json([r.caption for r in images.records]) for key, images in sets.items()} if told else None,
    }


def _deciding(options: AttackOptions) -> list[str]:
    """The options that change an answer of the attacks that are run."""
    names = ["attack_steps", "attack_prompts", "resolution", "seed", "dtype"]
    if "noise" in options.attacks:
        names += ["attack_t", "attack_modes"]
    if "mask" in options.attacks:
        names += ["mask_share"]
    if {"mask", "magnitude"} & set(options.attacks):
        names += ["guidance_scale"]
    return names


# -- command line ------------------------------------------------------------------


@dataclass
class Options(AttackOptions):
    lora: str | None = option(None, "LoRA: directory or .safetensors file", metavar="PATH")
    unet: str | None = option(None, "fully fine-tuned UNet: directory or .safetensors file", metavar="PATH")
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
        main_process = processes.is_main()  # before anything is put on a GPU: it gives each process its own
        train = drop_duplicates(read_folder(options.train_data_dir, options.caption_column))
        heldout = drop_duplicates(read_folder(options.heldout_data_dir, options.caption_column), train)
        checkpoint = tuned(options)
        embedder = load_embedder(options.embedder, options.embedder_weights, resolve_device(options.device))
        answers = attack(options, checkpoint, train, heldout, embedder, Path(options.output_dir))
    except (OptionError, StageError, ImagesMissing, OSError, *model_errors()) as error:
        print(f"eval.attack: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if main_process:
        _print(attack_figures(answers["train"], answers["heldout"]))
        print(Path(options.output_dir) / "attack.json")
    return 0


def _print(figures: dict[str, dict]) -> None:
    for name, one in figures.items():
        low, high = one["auc_interval"]
        print(f"{name}: AUC {one['auc']:.3f} ({low:.3f} to {high:.3f}), TPR at 1 % FPR {one['tpr_at_1_fpr']:.3f}")


if __name__ == "__main__":
    sys.exit(main())
