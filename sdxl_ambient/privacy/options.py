"""Options of ``python -m sdxl_ambient.privacy``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdxl_ambient.config.parser import option
from sdxl_ambient.config.shared import ModelOptions, check_levels, check_writable
from sdxl_ambient.devices import DTYPES, check_device
from sdxl_ambient.errors import OptionError
from sdxl_ambient.levels import MAXIMUM_T_N
from sdxl_ambient.provenance import read_json
from sdxl_ambient.store.lineage import format_levels, restored_levels


@dataclass
class PrivacyOptions(ModelOptions):
    """``python -m sdxl_ambient.privacy``."""

    train_data_dir: str | None = option(None, "folder of the images that are attacked; without it closed forms alone")
    reference_data_dir: str | None = option(
        None, "folder of other images: what an attacker knows of pictures in general, and the wrong candidates"
    )
    caption_column: str = option("text", "the column of metadata.jsonl that holds the captions")
    instance_prompt: str | None = option(None, "caption for images that have none; without it they are skipped")
    caption: bool = option(True, "tell the model each image's caption, as whoever has them would; false tells it none")
    resolution: int = option(1024, "side of the square that images are resized and cropped to, pixels", minimum=16)
    center_crop: bool = option(True, "crop the middle; if false, the place that a store would take")
    t_n: list[int] = option([100, 300, 500, 800], "noise levels, timesteps", minimum=0, maximum=MAXIMUM_T_N)
    num_images: int = option(8, "images that are reconstructed, evenly from the set", minimum=1)
    num_candidates: int = option(256, "images of the set that are looked for, at most", minimum=1)
    num_references: int = option(256, "reference images used, at most", minimum=4)
    draws: int = option(4, "observations that each image is looked for with", minimum=1)
    use_unet: bool = option(True, "also reconstruct with the base model; false: linear filter and identification alone")
    posterior_samples: int = option(2, "samples by the reverse chain, per image and level", minimum=0, maximum=16)
    steps: int = option(25, "evaluations of the chain that draws one", minimum=1)
    dimension: int = option(4 * 128 * 128, "numbers in a latent, for the closed forms [SDXL at 1024 pixels]", minimum=1)
    clip_norm: float | None = option(None, "also account for latents clipped to this norm", above=0)
    delta: float = option(1e-5, "δ of (ε, δ)-differential privacy, below 1", above=0)
    seed: int = option(0, "the noise follows from this, the level and the image", minimum=0)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, …")
    dtype: str = option("float32", "precision of UNet and text encoders", choices=tuple(DTYPES))
    output_file: str | None = option(None, "JSON file for the figures; without it they are printed")

    def validate(self) -> None:
        super().validate()
        check_levels(self.t_n)
        if self.delta >= 1:
            raise OptionError(f"--delta: {self.delta} is not below 1")
        self._validate_folders()
        check_device(self.device)
        if self.output_file:
            check_output(self.output_file)

    def _validate_folders(self) -> None:
        for name in ("train_data_dir", "reference_data_dir"):
            folder = getattr(self, name)
            if folder is not None and not Path(folder).is_dir():
                raise OptionError(f"--{name}: {folder!r} is not a folder")
            if folder is not None and (observed := restored_levels(Path(folder))) is not None:
                raise OptionError(
                    f"--{name}: {folder!r} is a store of restored samples, which are no observations; what protects their "
                    f"images is the noise of the observations behind them: give the images and --t_n "
                    f"{format_levels(observed.values())}"
                )
        if (self.train_data_dir is None) != (self.reference_data_dir is None):
            raise OptionError("--reference_data_dir: goes with --train_data_dir; allowed are both or neither")
        if self.train_data_dir and Path(self.train_data_dir).resolve() == Path(self.reference_data_dir).resolve():
            raise OptionError(
                f"--reference_data_dir: {self.reference_data_dir!r} is --train_data_dir; allowed is a folder of other images"
            )


def check_output(file: str) -> None:
    """A file that can be written and is not another program's; an OptionError else."""
    path = Path(file)
    if path.is_dir():
        raise OptionError(f"--output_file: {file!r} is a folder, a file is needed")
    check_writable("output_file", str(path.parent))
    try:
        if path.exists() and "zcdp" not in read_json(path):
            raise ValueError
    except (OSError, ValueError, TypeError):
        raise OptionError(
            f"--output_file: {file!r} holds something else; allowed is a new file, or one of this program's"
        ) from None
