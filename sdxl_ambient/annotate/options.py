"""Options of ``python -m sdxl_ambient.annotate``, and the names of what it writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdxl_ambient.config.parser import option, redeclare
from sdxl_ambient.config.shared import DeviceOptions, ImageOptions, ModelOptions, SeedOptions, check_encoding, check_writable
from sdxl_ambient.errors import OptionError
from sdxl_ambient.levels import MAXIMUM_T_N
from sdxl_ambient.locks import is_empty
from sdxl_ambient.provenance import read_json

SETS = ("trusted", "untrusted")
CONFIDENCE = 0.95
ANNOTATIONS, METADATA = "annotations.json", "metadata.jsonl"


@dataclass
class AnnotateOptions(DeviceOptions, SeedOptions, ModelOptions):
    """Sets, levels and classifiers"""

    trusted_data_dir: str = option(None, "folder of images as they should be, captions as in training")
    untrusted_data_dir: str = option(None, "folder of other images: blurred, recompressed, generated, …")
    caption_column: str = redeclare(ImageOptions, "caption_column")
    caption_encoding: str | None = redeclare(ImageOptions, "caption_encoding")
    instance_prompt: str | None = redeclare(ImageOptions, "instance_prompt")
    resolution: int = redeclare(ImageOptions, "resolution")
    center_crop: bool = redeclare(ImageOptions, "center_crop")
    levels: list[int] = option(
        list(range(0, 951, 50)), "noise levels that are tested, timesteps", minimum=0, maximum=MAXIMUM_T_N
    )
    margin: float = option(
        0.05, "how far below 1/2, which is chance, an image's probability of being a trusted one may be", above=0
    )
    max_t_n: int = option(
        MAXIMUM_T_N, "untrusted images that are usable only above this level are left out", minimum=0, maximum=MAXIMUM_T_N
    )
    trusted_t_n: int | None = option(
        None, "noise level of the trusted images [default: clean]", minimum=0, maximum=MAXIMUM_T_N
    )
    train_steps: int = option(500, "optimizer steps of each classifier", minimum=1)
    batch_size: int = option(32, "noisy latents in a step, half of them of each set", minimum=2)
    learning_rate: float = option(2e-3, "of AdamW, falling to 0 by a cosine", above=0)
    num_noises: int = option(4, "noises that an image is judged with, at every level", minimum=1)
    folds: int = option(5, "classifiers; each judges the part of both sets that it was not trained on", minimum=2)
    output_dir: str = option(None, "folder for the result")

    def validate(self) -> None:
        super().validate()
        for name in SETS:
            folder = getattr(self, f"{name}_data_dir")
            if not folder:
                raise OptionError(f"--{name}_data_dir: a value is required, a folder of images")
            if not Path(folder).is_dir():
                raise OptionError(f"--{name}_data_dir: {folder!r} is not a folder")
        if not self.output_dir:
            raise OptionError("--output_dir: a value is required, a folder for the result")
        check_writable("output_dir", self.output_dir)
        check_encoding(self.caption_encoding)
        self._validate_places()
        if len(self.levels) < 2 or sorted(set(self.levels)) != self.levels:
            raise OptionError(f"--levels: {self.levels} is not allowed; two or more are needed, ascending, each once")
        if self.margin >= 0.5:
            raise OptionError(f"--margin: {self.margin:g} is not below 0.5, at which every image would be usable clean")
        if self.batch_size % 2:
            raise OptionError(f"--batch_size: {self.batch_size} is not even; half a batch is of each set")
        self.validate_device()

    def _validate_places(self) -> None:
        """Three folders, none within another; and nothing of a user's where links will be."""
        from sdxl_ambient.store.lineage import is_store  # here for start-up time

        places = {n: Path(getattr(self, n)).resolve() for n in ("trusted_data_dir", "untrusted_data_dir", "output_dir")}
        for name, place in places.items():
            for other, outer in places.items():
                if name != other and place.is_relative_to(outer):
                    raise OptionError(
                        f"--{name}: {getattr(self, name)!r} is or lies inside --{other}; allowed are three separate folders"
                    )
        output = places["output_dir"]
        store = next((folder for folder in (output, *output.parents) if is_store(folder)), None)
        if store is not None:
            raise OptionError(
                f"--output_dir: {self.output_dir!r} lies inside the store of noisy latents {str(store)!r}; allowed is a "
                "folder elsewhere"
            )
        if not is_empty(output) and not is_result(output):
            raise OptionError(
                f"--output_dir: {self.output_dir!r} holds something else; allowed is a new or empty folder, or a result of "
                "this program, which is replaced"
            )


def is_result(folder: Path) -> bool:
    """Whether a folder holds what this program writes, finished or not, and where its links are nothing but links."""
    try:
        ours = read_json(folder / ANNOTATIONS)["program"] == "sdxl_ambient.annotate"
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return ours and all(p.is_symlink() or p.is_dir() for name in SETS for p in (folder / name).rglob("*"))
