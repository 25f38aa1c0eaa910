"""Options of ``python -m sdxl_ambient.hub``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdxl_ambient.config.parser import option
from sdxl_ambient.errors import OptionError


@dataclass
class PushOptions:
    """``python -m sdxl_ambient.hub``."""

    output_dir: str | None = option(None, "the finished run's folder")
    hub_model_id: str | None = option(None, "repository on the Hub [default: the folder's name]")
    hub_private: bool = option(True, "make that repository a private one")
    hub_license: str = option("openrail++", "licence in the model card; the default is SDXL's own")
    memorization_report: str | None = option(
        None, "report.json of an evaluation, for the model card [default: OUTPUT_DIR/report/report.json where it is there]"
    )
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
