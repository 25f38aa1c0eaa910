"""Options of ``python -m sdxl_ambient.loop``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdxl_ambient.config.parser import option, redeclare
from sdxl_ambient.config.shared import (
    LoraOrUnetOptions,
    ModelOptions,
    PrecisionOptions,
    ReconstructionOptions,
    SeedOptions,
    check_writable,
)
from sdxl_ambient.errors import OptionError
from sdxl_ambient.levels import MAXIMUM_T_N


@dataclass
class LoopOptions(PrecisionOptions, SeedOptions, LoraOrUnetOptions, ModelOptions):
    """Stores and restoring"""

    latents_dir: str = option(None, "store of noisy latents, or of restored samples, to restore")
    t_n: int = option(
        None,
        "noise level to restore to, a timestep below the images'; images at or below it are taken over as they are",
        minimum=0,
        maximum=MAXIMUM_T_N,
    )
    steps: int = redeclare(ReconstructionOptions, "steps", default=50)
    batch_size: int = option(4, "images in each forward pass", minimum=1)
    allow_foreign_model: bool = option(
        False,
        "restore with a model that was not trained on this store alone: if it has seen more of these images, no t_n says "
        "what protects them",
    )
    output_dir: str = option(None, "folder for the new store")

    def validate(self) -> None:
        super().validate()
        if self.lora is not None and self.unet is not None:
            raise OptionError("--unet: excludes --lora; allowed is one of them, or neither for the base model")
        for name in ("lora", "unet"):
            value = getattr(self, name)
            if value is not None and not Path(value).exists():
                raise OptionError(f"--{name}: {value!r} does not exist")
        if not self.latents_dir:
            raise OptionError("--latents_dir: a value is required, a store of noisy latents")
        if not (Path(self.latents_dir) / "manifest.json").is_file():
            raise OptionError(f"--latents_dir: {self.latents_dir!r} is not a finished store: it has no manifest.json")
        if self.t_n is None:
            raise OptionError(f"--t_n: a value is required, a timestep from 0 to {MAXIMUM_T_N} below the store's")
        if not self.output_dir:
            raise OptionError("--output_dir: a value is required, a folder for the new store")
        check_writable("output_dir", self.output_dir)
        self._validate_output()

    def _validate_output(self) -> None:
        from sdxl_ambient.store.lineage import is_store, restored_levels  # here for start-up time

        output, store = Path(self.output_dir).resolve(), Path(self.latents_dir).resolve()
        if output.is_relative_to(store):
            raise OptionError(
                f"--output_dir: {self.output_dir!r} lies in --latents_dir, which stays as it is; allowed is another folder"
            )
        if is_store(output) and restored_levels(output) is None:
            raise OptionError(
                f"--output_dir: {self.output_dir!r} holds a store of something else than restored samples; allowed is "
                "another folder"
            )
