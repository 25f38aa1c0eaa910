"""Options of ``python -m sdxl_ambient.preview``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdxl_ambient.config.parser import option
from sdxl_ambient.config.shared import ModelOptions, check_levels, check_writable
from sdxl_ambient.devices import DTYPES, check_device
from sdxl_ambient.errors import OptionError
from sdxl_ambient.levels import MAXIMUM_T_N
from sdxl_ambient.store.lineage import is_store


@dataclass
class PreviewOptions(ModelOptions):
    """``python -m sdxl_ambient.preview``."""

    train_data_dir: str | None = option(None, "folder of images, with captions in metadata.jsonl or .txt files")
    caption_column: str = option("text", "the column of metadata.jsonl that holds the captions")
    instance_prompt: str | None = option(None, "caption for images that have none; without it they are skipped")
    caption: bool = option(True, "tell the model each image's caption, as whoever has them would; false tells it none")
    resolution: int = option(1024, "side of the square that images are resized and cropped to, pixels", minimum=16)
    center_crop: bool = option(True, "crop the middle; if false, the place that a store would take")
    t_n: list[int] = option([100, 300, 500, 800], "noise levels to show, timesteps", minimum=0, maximum=MAXIMUM_T_N)
    num_images: int = option(4, "images shown, evenly from the set", minimum=1)
    num_candidates: int = option(256, "images of the set that one is looked for among, at most", minimum=1)
    posterior_samples: int = option(2, "samples by the reverse chain, per image and level", minimum=0, maximum=16)
    steps: int = option(25, "evaluations of the chain that draws one", minimum=1)
    seed: int = option(0, "the preview's own noise follows from this, the level and the image", minimum=0)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, …")
    dtype: str = option("float32", "precision of UNet and text encoders", choices=tuple(DTYPES))
    redraw: bool = option(False, "only make preview.png again from the files in --output_dir")
    output_dir: str | None = option(None, "folder for the preview")

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
        self._validate_output()
        check_levels(self.t_n)
        check_device(self.device)

    def _validate_output(self) -> None:
        """What is made to be kept apart from clean images must not come to hold them."""
        output = Path(self.output_dir).resolve()
        if output.is_relative_to(Path(self.train_data_dir).resolve()):
            raise OptionError(
                f"--output_dir: {self.output_dir!r} lies inside --train_data_dir, whose images it would be taken for; "
                "allowed is a folder elsewhere"
            )
        for folder in (output, *output.parents):
            if is_store(folder):
                raise OptionError(
                    f"--output_dir: {self.output_dir!r} lies inside the store of noisy latents {str(folder)!r}, and a "
                    "preview holds clean images; allowed is a folder elsewhere"
                )
