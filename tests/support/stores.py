"""Make stores of noisy latents, and look into them."""

import os
from pathlib import Path

import torch
from safetensors.torch import load

from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.images.load import load_rgb
from sdxl_ambient.models.vae import encode_image
from sdxl_ambient.store.scan import content_hash


def load_file(path: Path) -> dict[str, torch.Tensor]:
    """A shard in memory. (safetensors' own load_file maps the file, which these tests overwrite.)"""
    return load(path.read_bytes())


def latents_in(store: Path) -> dict[str, torch.Tensor]:
    """Every noisy latent of a store by the content of its picture."""
    return {k: v for path in sorted(store.glob("latents-*.safetensors")) for k, v in load_file(path).items()}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def clean_latents(images: Path, encoders, resolution=64) -> dict[str, torch.Tensor]:
    """The latents of a folder's pictures without noise, by content."""
    found = {}
    for path in sorted(images.glob("*.png")):
        image = load_rgb(path)
        content = content_hash(image)
        found[content] = encode_image(encoders.vae, Geometry(resolution).apply(image, content)[0])
    return found


def command(images, output, miniature, *more) -> list[str]:
    """The command line, with the flags in ``more`` (name, value, …) added or in place of the usual ones."""
    flags = {
        "--pretrained_model_name_or_path": miniature, "--train_data_dir": images, "--output_dir": output,
        "--resolution": 64, "--shard_size": 2,
    }  # fmt: skip
    flags.update(zip(more[::2], more[1::2], strict=True))
    return [str(word) for flag in flags.items() for word in flag]


def environment(**more):
    """For a command that runs as a process of its own."""
    repository = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": repository, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}
