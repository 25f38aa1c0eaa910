"""Draws the images that are measured: one seed per image, whatever the batch, resumed where it stopped."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from eval.checkpoints import Checkpoint, hash_weights, resolve_base
from eval.drawn import MANIFEST, METADATA, whole_images
from eval.processes import collect, is_main, share, wait
from eval.samplers import Sampler
from eval.stored import read_object
from sdxl_ambient.devices import DTYPES, resolve_device
from sdxl_ambient.errors import JsonError, StageError, TextError
from sdxl_ambient.formats.load_lora import set_strength
from sdxl_ambient.images.captions import Columns
from sdxl_ambient.images.load import list_images
from sdxl_ambient.locks import is_empty
from sdxl_ambient.models.base import unet_config
from sdxl_ambient.models.load import load_unet
from sdxl_ambient.models.prediction import check_prediction
from sdxl_ambient.models.vae import load_vae
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.pipeline import load_pipeline, sample
from sdxl_ambient.provenance import (
    atomic,
    differences,
    environment,
    hash_file,
    hash_json,
    parse_json,
    write_sealed,
)
from sdxl_ambient.randomness import image_seed
from sdxl_ambient.spread import spread
from sdxl_ambient.texts import read_lines

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


@dataclass(frozen=True)
class ImageRequest:
    """One image to make: ``seed`` is the image's own, ``run`` the seed of the run that it belongs to."""

    index: int
    prompt: str
    seed: int
    run: int = 0

    @property
    def file(self) -> str:
        return f"images/{self.index:06d}.png"


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a .jsonl file (``text``) or of any other, one per line; empty lines are skipped.

    Raises:
        StageError: no prompt in it, or a line that isn't an object with a ``text``.
    """
    path = Path(path)
    try:
        lines = read_lines(path)
    except TextError as error:
        raise StageError(f"--prompts_file: {error}") from None
    if path.suffix == ".jsonl":
        lines = [_prompt_of(line, path, number) for number, line in enumerate(lines, 1)]
    if not lines:
        raise StageError(f"--prompts_file: {str(path)!r} holds no prompt")
    return lines


def _prompt_of(line: str, path: Path, number: int) -> str:
    try:
        row = parse_json(line, "the line")
    except JsonError:
        row = None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise StageError(f"--prompts_file: {str(path)!r}, prompt {number}: not a JSON object with a 'text'")
    return text


def captions_of(folder: str | Path, columns: Columns | None = None) -> list[str]:
    """The captions of a data set in the order of its images. Raises StageError if it has none."""
    captions = [r.caption for r in list_images(folder, columns) if r.caption]
    if not captions:
        raise StageError(f"--train_data_dir: {str(folder)!r} has no captions to use as prompts; give --prompts_file")
    return captions


def plan(
    prompts: list[str],
    seed: int,
    num_images: int | None = None,
    images_per_prompt: int | None = None,
    num_seeds: int = 1,
    mean_of: int | None = None,
) -> list[ImageRequest]:
    """The images to draw, the same prompts for each seed. Fewer images than prompts: evenly spaced prompts; more: the
    prompts over and over.

    With ``mean_of`` = k, a k-th of the prompts (rounded down, at least one), evenly, each k times in a row.
    """
    if num_images is not None and num_images < len(prompts):
        chosen = spread(prompts, num_images)
    else:
        total = num_images or len(prompts) * (images_per_prompt or 1)
        chosen = [prompts[i % len(prompts)] for i in range(total)]
    if mean_of is not None:
        chosen = [prompt for prompt in spread(chosen, max(1, len(chosen) // mean_of)) for _ in range(mean_of)]
    runs = [(run, i, prompt) for run in range(seed, seed + num_seeds) for i, prompt in enumerate(chosen)]
    return [ImageRequest(index, prompt, image_seed(run, i), run) for index, (run, i, prompt) in enumerate(runs)]


@dataclass(frozen=True)
class GenerationSettings:
    """The model that images are drawn with, and how. Values of the options of these names."""

    pretrained_model_name_or_path: str | None
    pretrained_vae_model_name_or_path: str | None
    revision: str | None
    variant: str | None
    prediction_type: str | None
    lora_scale: float
    num_images: int | None
    images_per_prompt: int | None
    batch_size: int
    num_inference_steps: int
    guidance_scale: float
    resolution: int | None
    num_seeds: int
    seed: int
    dtype: str
    device: str


def base_folder(settings: GenerationSettings) -> Path:
    """The base model's folder or single file, downloaded from the Hub where it is neither."""
    assert settings.pretrained_model_name_or_path is not None, "the options' own check asks for it"
    base = settings.pretrained_model_name_or_path
    return resolve_base(base, settings.revision, settings.variant, settings.prediction_type)


def open_pipeline(settings: GenerationSettings, checkpoint: Checkpoint, lora_scale: float = 1.0) -> Any:
    """The ``StableDiffusionXLPipeline`` that a checkpoint draws with, on its device.

    Raises:
        ModelError: a part that can't be used, or a UNet that predicts another thing than its scheduler says.
    """
    base = base_folder(settings)
    pipe = load_pipeline(
        str(base),
        lora=checkpoint.lora,
        lora_scale=lora_scale,
        unet=checkpoint.unet,
        vae=settings.pretrained_vae_model_name_or_path,
        dtype=DTYPES[settings.dtype],
        variant=settings.variant,
        prediction_type=settings.prediction_type,
    ).to(resolve_device(settings.device))
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    check_prediction(pipe.unet, schedule, repr(str(checkpoint.unet or base)), settings.prediction_type)
    return pipe


def describe(settings: GenerationSettings, checkpoint: Checkpoint, sampler: Sampler, draws: list[ImageRequest]) -> dict:
    """Everything that determines the images, for the manifest."""
    vae = settings.pretrained_vae_model_name_or_path
    return {
        "base_weights": hash_weights(base_folder(settings), "base"),
        **({} if settings.prediction_type is None else {"prediction_type": settings.prediction_type}),
        "vae_weights": hash_weights(Path(vae), "vae") if vae and Path(vae).exists() else vae,
        "lora_weights": hash_weights(checkpoint.lora, "lora") if checkpoint.lora else None,
        "unet_weights": hash_weights(checkpoint.unet, "unet") if checkpoint.unet else None,
        **sampler.describe(),
        "lora_scale": sampler.lora_scale if checkpoint.lora else None,
        "num_inference_steps": settings.num_inference_steps,
        "resolution": settings.resolution,
        "seed": settings.seed,
        "num_seeds": settings.num_seeds,
        "dtype": settings.dtype,
        "device": torch.device(resolve_device(settings.device)).type,
        "num_images": len(draws),
        "prompts": hash_json([d.prompt for d in draws]),
    }


def open_checkpoint(settings: GenerationSettings, checkpoint: Checkpoint) -> Callable[..., list[Image.Image]]:
    """A function (prompts, generators, sampler) → images that loads the pipeline when it is first called."""
    base = str(base_folder(settings))
    dtype, device = DTYPES[settings.dtype], resolve_device(settings.device)

    @functools.cache
    def pipe() -> Any:
        return open_pipeline(settings, checkpoint)

    @functools.cache
    def base_unet() -> torch.nn.Module:
        # The cast, since diffusers wraps Module.to in a way that hides its arguments.
        return cast(torch.nn.Module, load_unet(base, dtype=dtype, variant=settings.variant)).to(device)

    def draw(prompts: list[str], generators: list[torch.Generator], sampler: Sampler) -> list[Image.Image]:
        if checkpoint.lora:
            set_strength(pipe(), 1.0 if sampler.lora_scale is None else sampler.lora_scale)
        images = sample(
            pipe(),
            prompts,
            sampler=sampler.mode,
            t_n=sampler.t_n,
            base_unet=base_unet() if sampler.mode == "hybrid" and checkpoint.unet else None,
            generators=generators,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=sampler.guidance_scale,
            height=settings.resolution,
            width=settings.resolution,
        )
        return cast("list[Image.Image]", images)  # the output type is "pil"

    return draw


def open_vae(settings: GenerationSettings) -> tuple[AutoencoderKL, int]:
    """The VAE that images are drawn with, and their side in pixels."""
    base = base_folder(settings)
    vae = load_vae(base, settings.pretrained_vae_model_name_or_path, variant=settings.variant)
    size = unet_config(base).get("sample_size")
    if settings.resolution is None and not isinstance(size, int):
        raise StageError(f"--resolution: needed, since the UNet of {base} names no single side of its images (sample_size)")
    cast(torch.nn.Module, vae).to(resolve_device(settings.device))
    return vae, settings.resolution or size * 2 ** (len(vae.config["block_out_channels"]) - 1)


def generate_images(
    folder: str | Path,
    settings: dict,
    draws: list[ImageRequest],
    draw: Callable[[list[str], list[torch.Generator]], list[Image.Image]],
    batch_size: int,
    about: dict | None = None,
) -> int:
    """Draw what is missing in ``folder`` and return how many images that was (of this process).

    Writes ``images/000000.png`` …, each whole or not at all, ``manifest.json`` first and ``metadata.jsonl`` last, so
    that the folder is an imagefolder once it is complete. ``draw`` isn't called when nothing is missing. All processes
    call it and share the batches.

    Args:
        settings: what determines the images. A folder made with other settings is refused.
        about: kept in the manifest, not compared.

    Raises:
        StageError: the folder holds images of other settings; the message names the differences.
    """
    folder = Path(folder)
    _claim(folder, settings, about or {})
    # Whole batches, also when only one image of a batch is missing: a resumed run repeats the uninterrupted run's
    # arithmetic.
    batches = share([draws[i : i + batch_size] for i in range(0, len(draws), batch_size)])
    whole = whole_images(folder, [d.file for batch in batches for d in batch])
    missing = [batch for batch in batches if not all(d.file in whole for d in batch)]
    done, total = 0, sum(map(len, missing))
    hidden = not missing or not is_main()
    with tqdm(total=total, unit="image", desc=f"draw {'/'.join(folder.parts[-2:])}", disable=hidden) as bar:
        for batch in missing:
            images = draw([d.prompt for d in batch], [torch.Generator("cpu").manual_seed(d.seed) for d in batch])
            for one, image in zip(batch, images, strict=True):
                with atomic(folder / one.file) as temporary:
                    image.save(temporary)
            done += len(batch)
            bar.update(len(batch))
            if all(np.ptp(np.asarray(image)) == 0 for image in images):
                bar.write(f"{folder}: images {batch[0].index} to {batch[-1].index} are uniform; float16 needs another VAE")
    drawn = sum(collect([done])) > 0
    if is_main() and (drawn or not (folder / METADATA).is_file()):
        _write_metadata(folder, draws)
    wait()
    return done


def _write_metadata(folder: Path, draws: list[ImageRequest]) -> None:
    rows = [
        {
            "file_name": d.file,
            "text": d.prompt,
            "index": d.index,
            "seed": d.seed,
            "run": d.run,
            "sha256": hash_file(folder / d.file),
        }
        for d in draws
    ]
    rows = [json.dumps(row) for row in rows]
    with atomic(folder / METADATA) as temporary:
        temporary.write_text("\n".join(rows) + "\n", encoding="utf-8")


def average_images(source: Path, folder: str | Path, draws: list[ImageRequest], count: int) -> list[ImageRequest]:
    """Pixel means of ``count`` consecutive images of ``source`` at a time, as an imagefolder with a manifest.

    Returns the means as draws, each with the prompt and the run of its first image. A mean that is there is not made again.
    """
    folder = Path(folder)
    manifest = read_object(source / MANIFEST, ["settings", "about"], "delete that folder and run again")
    _claim(folder, {**manifest["settings"], "averaged": count}, {**manifest["about"], "samples": source.name})
    groups = [draws[i : i + count] for i in range(0, len(draws), count)]
    means = [ImageRequest(index, group[0].prompt, group[0].seed, group[0].run) for index, group in enumerate(groups)]
    whole = whole_images(folder, [mean.file for mean in means])
    for mean, group in zip(means, groups, strict=True):
        if is_main() and mean.file not in whole:
            pixels = np.mean([np.asarray(Image.open(source / d.file), np.float32) for d in group], axis=0)
            with atomic(folder / mean.file) as temporary:
                Image.fromarray(np.round(pixels).astype(np.uint8)).save(temporary)
    if is_main() and (len(whole) < len(means) or not (folder / METADATA).is_file()):
        _write_metadata(folder, means)
    wait()
    return means


def _claim(folder: Path, settings: dict, about: dict) -> None:
    """Make the folder ours, or make sure that it already is. One that was refused before its first image is free."""
    path, changed = folder / MANIFEST, []
    there = path.is_file()
    if there:
        advice = "give another --output_dir, or delete that folder"
        changed = differences(read_object(path, ["settings"], advice)["settings"], settings)
        if changed and any((folder / "images").glob("*")):
            raise StageError(f"{folder} holds images of other settings ({'; '.join(changed)}); {advice}")
    if is_main() and (changed or not there):
        if not there and not is_empty(folder):
            raise StageError(f"{folder} is not empty and has no {MANIFEST}; give another --output_dir")
        write_sealed(path, {"settings": settings, "about": about, "environment": environment()})
        (folder / "images").mkdir(exist_ok=True)
    wait()


def generate(
    settings: GenerationSettings, checkpoint: Checkpoint, samplers: list[Sampler], prompts: list[str], root: Path
) -> dict[str, tuple[Path, list[ImageRequest]]]:
    """Draw one checkpoint with each sampler into ``root/NAME``; the model is loaded once, if at all.

    Returns each sampler's folder and what is in it.
    """
    draw = open_checkpoint(settings, checkpoint)
    folders: dict[str, tuple[Path, list[ImageRequest]]] = {}
    for sampler in samplers:
        many = (sampler.num_images, None) if sampler.num_images else (settings.num_images, settings.images_per_prompt)
        draws = plan(prompts, settings.seed, *many, settings.num_seeds, sampler.mean_of)
        folder = root / sampler.name
        samples = folder if sampler.mean_of is None else root / f"{sampler.name}.samples"
        about = {
            "name": checkpoint.name,
            "base": settings.pretrained_model_name_or_path,
            "lora": str(checkpoint.lora) if checkpoint.lora else None,
            "unet": str(checkpoint.unet) if checkpoint.unet else None,
        }
        described = describe(settings, checkpoint, sampler, draws)
        generate_images(samples, described, draws, functools.partial(draw, sampler=sampler), settings.batch_size, about)
        if sampler.mean_of is not None:
            draws = average_images(samples, folder, draws, sampler.mean_of)
        folders[sampler.name] = (folder, draws)
    return folders
