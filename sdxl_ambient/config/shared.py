"""Options that several commands have, each declared once, and the checks that go with them.

A command's class inherits the groups that it has whole, and takes single options of others with
:func:`sdxl_ambient.config.parser.redeclare`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sdxl_ambient.config.parser import APPLIED, SAME, option
from sdxl_ambient.errors import OptionError
from sdxl_ambient.levels import MAXIMUM_T_N, PREDICTION_TYPES
from sdxl_ambient.texts import is_encoding

DTYPES = ("float32", "float16", "bfloat16")  # names alone; sdxl_ambient.devices knows what they stand for in torch


@dataclass
class ModelOptions:
    """Base model"""

    pretrained_model_name_or_path: str = option(
        None,
        "base model: a local directory in diffusers format, a single .safetensors file, or a name on the Hub",
        resume=APPLIED,
    )
    pretrained_vae_model_name_or_path: str | None = option(
        None, "another VAE than the base model's own: a directory, a .safetensors file, or a name on the Hub", resume=APPLIED
    )
    revision: str | None = option(None, "branch, tag or commit of the base model on the Hub", resume=APPLIED)
    variant: str | None = option(None, "variant of the weight files, such as fp16", resume=APPLIED)
    prediction_type: str | None = option(
        None,
        "what the base model's UNet predicts, where its scheduler says another thing",
        choices=PREDICTION_TYPES,
        resume=SAME,
    )

    def validate(self) -> None:
        if not self.pretrained_model_name_or_path:
            raise OptionError("--pretrained_model_name_or_path: a value is required, a directory, a file or a Hub name")
        self.check_single_file()

    def check_single_file(self) -> None:
        """A single file has no variants and no history; an OptionError where one is asked for."""
        base = self.pretrained_model_name_or_path
        for name in ("revision", "variant"):
            if base and getattr(self, name) is not None and Path(base).is_file():
                raise OptionError(f"--{name}: {getattr(self, name)!r} can not be had of the single file {base!r}")


@dataclass
class ImageOptions:
    """Images"""

    train_data_dir: str | None = option(
        None,
        "folder of images, with captions in metadata.jsonl, .csv or .parquet, or in .txt files",
        resume=APPLIED,
    )
    caption_column: str = option(
        "text",
        "column of the captions: a text, or a list of texts, of which training draws one each time the picture is shown",
        resume=APPLIED,
    )
    caption_encoding: str | None = option(
        None,
        "encoding of captions and metadata without a byte order mark: latin-1, cp1252, … [default: utf-8]",
        resume=APPLIED,
    )
    instance_prompt: str | None = option(
        None, "caption for images that have none; without it they are skipped", resume=APPLIED
    )
    resolution: int = option(1024, "side of the square that images are resized and cropped to, pixels", minimum=16)
    center_crop: bool = option(True, "crop the middle; if false, a place drawn once per image, the same in every store")


@dataclass
class LevelOptions:
    """Noise levels"""

    t_n: list[int] = option([100, 300, 500, 800], "noise levels, timesteps", minimum=0, maximum=MAXIMUM_T_N)

    def validate_levels(self) -> None:
        """One level or more, each once; an OptionError else."""
        if not self.t_n:
            raise OptionError("--t_n: a value is required, one timestep or more")
        twice = [t for t in self.t_n if self.t_n.count(t) > 1]
        if twice:
            raise OptionError(f"--t_n: {twice[0]} is given twice; allowed is each level once")


@dataclass
class ReconstructionOptions:
    """Reconstruction"""

    caption: bool = option(True, "tell the model each image's caption, as whoever has them would; false tells it none")
    num_images: int = option(4, "images that are reconstructed, evenly from the set", minimum=1)
    num_candidates: int = option(256, "images of the set, at most, among which a latent's own is looked for", minimum=1)
    posterior_samples: int = option(2, "samples by the reverse chain, per image and level", minimum=0, maximum=16)
    steps: int = option(25, "reverse steps of the chain that draws a sample, an evaluation of the UNet each", minimum=1)


@dataclass
class SeedOptions:
    """Randomness"""

    # numpy's first generators, which accelerate and other libraries seed, take 32 bits.
    seed: int = option(
        0,
        "seed of everything that is drawn, except the noise of a store, which has its own key",
        minimum=0,
        maximum=2**32 - 1,
    )


@dataclass
class DeviceOptions:
    """Device"""

    device: str = option("auto", "auto, cpu, cuda, cuda:1, …")

    def validate_device(self) -> None:
        """auto, cpu, or a CUDA GPU that is there; an OptionError else."""
        from sdxl_ambient.devices import check_device  # here for start-up time: it imports torch

        check_device(self.device)


@dataclass
class PrecisionOptions:
    """Precision"""

    dtype: str = option("float32", "precision of UNet and text encoders", choices=DTYPES)


@dataclass
class LoraOrUnetOptions:
    """Fine-tuned weights"""

    lora: str | None = option(
        None, "LoRA: a folder or a .safetensors file, of ours, of diffusers or of kohya's scripts", metavar="PATH"
    )
    unet: str | None = option(
        None,
        "in its place, a fully fine-tuned UNet: a training run, a unet folder, or a .safetensors file",
        metavar="PATH",
    )


def check_outside(name: str, folder: str, **images: str | None) -> None:
    """A folder for results that doesn't lie among images, by the option that names them; an OptionError else.

    What is written there would be read as data the next time.
    """
    for option_name, among in images.items():
        if among is not None and Path(folder).resolve().is_relative_to(Path(among).resolve()):
            raise OptionError(
                f"--{name}: {folder!r} lies inside --{option_name} {among!r}, whose images its own would be taken for; "
                "allowed is a folder elsewhere"
            )


def check_encoding(name: str | None) -> None:
    """A text encoding, or None; an OptionError else."""
    if name is not None and not is_encoding(name):
        raise OptionError(f"--caption_encoding: {name!r} is no text encoding; allowed are latin-1, cp1252, utf-16-le, …")


def check_writable(name: str, folder: str) -> None:
    """A folder that can be made or written into; an OptionError else. Makes nothing."""
    path = Path(folder).resolve()
    if path.exists() and not path.is_dir():
        raise OptionError(f"--{name}: {folder!r} is a file, a folder is needed")
    while not path.exists():
        path = path.parent
    if not path.is_dir() or not os.access(path, os.W_OK):
        raise OptionError(f"--{name}: {folder!r} can not be written to")
