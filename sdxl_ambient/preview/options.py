"""Options of ``python -m sdxl_ambient.preview``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdxl_ambient.config.parser import option
from sdxl_ambient.config.shared import (
    DeviceOptions,
    ImageOptions,
    LevelOptions,
    ModelOptions,
    PrecisionOptions,
    ReconstructionOptions,
    SeedOptions,
    check_encoding,
    check_outside,
    check_writable,
)
from sdxl_ambient.errors import OptionError


@dataclass
class PreviewOptions(
    PrecisionOptions, DeviceOptions, SeedOptions, ReconstructionOptions, LevelOptions, ImageOptions, ModelOptions
):  # the help shows the last one first
    """Preview"""

    redraw: bool = option(False, "only make preview.png again from the files in --output_dir")
    output_dir: str = option(None, "folder for the preview")

    def validate(self) -> None:
        if not self.output_dir:
            raise OptionError("--output_dir: a value is required, a folder for the preview")
        check_writable("output_dir", self.output_dir)
        if self.redraw:
            if not (Path(self.output_dir) / "preview.json").is_file():
                raise OptionError(f"--redraw: true needs a preview, and {self.output_dir!r} holds no preview.json")
            return
        super().validate()
        if not self.train_data_dir:
            raise OptionError("--train_data_dir: a value is required, a folder of images")
        if not Path(self.train_data_dir).is_dir():
            raise OptionError(f"--train_data_dir: {self.train_data_dir!r} is not a folder")
        check_encoding(self.caption_encoding)
        self._validate_output(self.train_data_dir)
        self.validate_levels()
        self.validate_device()

    def _validate_output(self, images: str) -> None:
        """What is made to be kept apart from clean images must not come to hold them."""
        from sdxl_ambient.store.lineage import is_store  # here for start-up time

        check_outside("output_dir", self.output_dir, train_data_dir=images)
        output = Path(self.output_dir).resolve()
        for folder in (output, *output.parents):
            if is_store(folder):
                raise OptionError(
                    f"--output_dir: {self.output_dir!r} lies inside the store of noisy latents {str(folder)!r}, and a "
                    "preview holds clean images; allowed is a folder elsewhere"
                )
