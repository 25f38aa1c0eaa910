"""Options of ``python -m sdxl_ambient.privacy``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdxl_ambient.config.parser import option, redeclare
from sdxl_ambient.config.shared import (
    DeviceOptions,
    ImageOptions,
    LevelOptions,
    ModelOptions,
    PrecisionOptions,
    ReconstructionOptions,
    SeedOptions,
    check_writable,
)
from sdxl_ambient.errors import OptionError
from sdxl_ambient.provenance import read_json


@dataclass
class PrivacyOptions(
    PrecisionOptions, DeviceOptions, SeedOptions, ReconstructionOptions, LevelOptions, ImageOptions, ModelOptions
):  # the help shows the last one first
    """Attacks and accounting"""

    reference_data_dir: str | None = option(
        None, "folder of other images: what an attacker knows of pictures in general, and the wrong candidates"
    )
    num_images: int = redeclare(ReconstructionOptions, "num_images", default=8)
    num_references: int = option(256, "reference images used, at most", minimum=4)
    draws: int = option(4, "observations that each image is looked for with", minimum=1)
    use_unet: bool = option(True, "also reconstruct with the base model; false: linear filter and identification alone")
    dimension: int = option(4 * 128 * 128, "numbers in a latent, for the closed forms [SDXL at 1024 pixels]", minimum=1)
    clip_norm: float | None = option(None, "also account for latents clipped to this norm", above=0)
    delta: float = option(1e-5, "δ of (ε, δ)-differential privacy, below 1", above=0)
    output_file: str | None = option(None, "JSON file for the figures; without it they are printed")

    def validate(self) -> None:
        super().validate()
        self.validate_levels()
        if self.delta >= 1:
            raise OptionError(f"--delta: {self.delta} is not below 1")
        self._validate_folders()
        self.validate_device()
        if self.output_file:
            check_output(self.output_file)

    def _validate_folders(self) -> None:
        from sdxl_ambient.store.lineage import format_levels, restored_levels  # here for start-up time

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
        if (
            self.train_data_dir
            and self.reference_data_dir
            and Path(self.train_data_dir).resolve() == Path(self.reference_data_dir).resolve()
        ):
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
