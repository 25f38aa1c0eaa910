"""Options of images and of stores of noisy latents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdxl_ambient.config.parser import APPLIED, FREE, option, redeclare
from sdxl_ambient.config.shared import ImageOptions, ModelOptions, check_encoding, check_outside, check_writable
from sdxl_ambient.errors import OptionError
from sdxl_ambient.home import check_home
from sdxl_ambient.levels import MAXIMUM_T_N

KEY_OPTIONS = ("noise_key", "noise_key_file")  # which no artefact records


@dataclass
class DataOptions(ModelOptions):
    """Images and latents"""

    train_data_dir: str | None = option(
        None,
        "folder of images, with captions in metadata.jsonl, .csv or .parquet, or in .txt files; or of parquet or "
        "webdataset files",
        resume=APPLIED,
    )
    dataset_name: str | None = option(
        None, "in its place, a data set that the datasets library loads from the Hub", resume=APPLIED
    )
    dataset_config_name: str | None = option(None, "its configuration", resume=APPLIED)
    dataset_split: str = option(
        "train", "its split that is trained on; also of a folder of parquet or webdataset files", resume=APPLIED
    )
    image_column: str = option("image", "its column of pictures", resume=APPLIED)
    caption_column: str = redeclare(ImageOptions, "caption_column")
    caption_encoding: str | None = redeclare(ImageOptions, "caption_encoding")
    t_n_column: str | None = option(
        None,
        "column of pictures' own noise levels, timesteps; -1 for clean, nothing for --t_n [default: --t_n for all]",
        resume=APPLIED,
    )
    pre_noised: bool = option(
        False,
        "the folder holds noisy latents in place of images: .safetensors files with one tensor latent (4, h, w) each, as "
        "the UNet sees them, at --t_n or the level in --t_n_column",
    )
    instance_prompt: str | None = redeclare(ImageOptions, "instance_prompt")
    resolution: int = redeclare(ImageOptions, "resolution")
    aspect_ratio_buckets: str | None = option(
        None,
        "sizes that pictures are cropped to in place of the square, the nearest to each picture's own shape: as 'h,w;h,w' "
        "in pixels, or auto, SDXL's list at --resolution 1024 and sizes of about that many pixels at others",
    )
    bucket_reso_steps: int = option(64, "sides of automatic buckets are multiples of this, pixels", minimum=8)
    near_duplicates: str = option(
        "report",
        "what is done with pictures that show another one again, recompressed, resized or mirrored: two noisy latents of "
        "one picture tell more of it than t_n promises",
        choices=("report", "drop", "refuse", "ignore"),
        resume=FREE,
    )
    center_crop: bool = redeclare(ImageOptions, "center_crop")
    t_n: int | None = option(
        500,
        "noise level of the stored latents, a timestep; none = clean latents (nothing is protected)",
        minimum=0,
        maximum=MAXIMUM_T_N,
    )
    noise_key: str = option(
        "kept",
        "the key that the noise is made from: kept in your configuration folder (python -m sdxl_ambient.key shows where), "
        "or none, one that is never written, so that no later run can observe these images again. Whoever has the key can "
        "remove the noise",
        choices=("kept", "none"),
        resume=FREE,
    )
    noise_key_file: str | None = option(
        None,
        "file with the key in place of the kept one; created with mode 600 if missing",
        metavar="PATH",
        resume=FREE,
    )
    allow_second_observation: bool = option(
        False,
        "observe images again that were observed with another key, VAE, size or crop, or draw a store anew; two independent "
        "draws can be averaged",
        resume=FREE,
    )
    shard_size: int = option(256, "images or captions per stored file", minimum=1, resume=FREE)

    @property
    def has_images(self) -> bool:
        """Whether there are pictures to make a store of."""
        return self.train_data_dir is not None or self.dataset_name is not None

    def validate_data(self) -> None:
        check_encoding(self.caption_encoding)
        if self.train_data_dir is not None and not Path(self.train_data_dir).is_dir():
            raise OptionError(f"--train_data_dir: {self.train_data_dir!r} is not a folder")
        if self.train_data_dir is not None and self.dataset_name is not None:
            raise OptionError(f"--dataset_name: {self.dataset_name!r} excludes --train_data_dir; allowed is one of them")
        if self.pre_noised and self.train_data_dir is None:
            raise OptionError("--pre_noised: true needs --train_data_dir, a folder of noisy latents")
        if self.pre_noised and self.aspect_ratio_buckets is not None:
            raise OptionError("--aspect_ratio_buckets: excludes --pre_noised, whose latents have their sizes")
        if self.pre_noised and self.near_duplicates in ("drop", "refuse"):
            raise OptionError(
                f"--near_duplicates: {self.near_duplicates!r} excludes --pre_noised, as noise hides them; allowed are "
                "report, ignore"
            )
        if self.pre_noised and self.t_n is None and self.t_n_column is None:
            raise OptionError("--t_n: none excludes --pre_noised; the level of the noisy latents is needed")

    def validate_key(self, *artefacts: str | None) -> None:
        if self.noise_key == "kept":
            check_home(*artefacts)
        elif self.noise_key_file is not None:
            raise OptionError("--noise_key: 'none' excludes --noise_key_file; allowed is one of them")
        if self.noise_key_file is None:
            return
        key = Path(self.noise_key_file).resolve()
        for folder in filter(None, artefacts):
            if key.is_relative_to(Path(folder).resolve()):
                raise OptionError(
                    f"--noise_key_file: {self.noise_key_file!r} lies inside {folder!r}, which is made to be shared; "
                    "keep the key elsewhere"
                )


@dataclass
class LatentsOptions(DataOptions):
    """Store"""

    output_dir: str = option(None, "folder for the store", resume=FREE)

    def validate(self) -> None:
        super().validate()
        if not self.has_images:
            raise OptionError("--train_data_dir: a value is required, a folder of images, or --dataset_name")
        self.validate_data()
        if not self.output_dir:
            raise OptionError("--output_dir: a value is required, a folder for the store")
        check_writable("output_dir", self.output_dir)
        check_outside("output_dir", self.output_dir, train_data_dir=self.train_data_dir)
        self.validate_key(self.output_dir, self.train_data_dir)
