"""Options of ``python -m sdxl_ambient.hub``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdxl_ambient.config.groups import HubOptions
from sdxl_ambient.config.parser import option, redeclare
from sdxl_ambient.errors import OptionError


@dataclass
class PushOptions:
    """Upload"""

    output_dir: str = option(None, "the finished run's folder")
    hub_model_id: str | None = redeclare(HubOptions, "hub_model_id")
    hub_private: bool = redeclare(HubOptions, "hub_private")
    hub_license: str = redeclare(HubOptions, "hub_license")
    memorization_report: str | None = redeclare(HubOptions, "memorization_report")
    validation_images: list[str] = option([], "pictures to upload and to show in the card [default: none]")

    def validate(self) -> None:
        if not self.output_dir or not Path(self.output_dir).is_dir():
            raise OptionError(f"--output_dir: {self.output_dir!r} is not a folder; a finished run's is needed")
        given = [
            ("memorization_report", self.memorization_report),
            *(("validation_images", p) for p in self.validation_images),
        ]
        for name, file in given:
            if file is not None and not Path(file).is_file():
                raise OptionError(f"--{name}: {file!r} is not a file")
