"""Every option of encoding and training, with its type, default, range and help. Names are the diffusers examples'."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from sdxl_ambient.config import OptionError, option
from sdxl_ambient.option_groups import (
    HubOptions,
    LifeOptions,
    LossOptions,
    OptimizerOptions,
    WatchOptions,
    WeightOptions,
)

MAXIMUM_T_N = 998  # one level above it must be left to train on
# Stores within --output_dir that no option places elsewhere.
_STORES = {
    "latents_dir": "latents",
    "heldout_latents_dir": "latents_heldout",
    "clean_latents_dir": "latents_clean_unprotected",
}


@dataclass
class ModelOptions:
    """Base model"""

    pretrained_model_name_or_path: str | None = option(
        None, "base model: a local directory in diffusers format, or a name on the Hub"
    )
    pretrained_vae_model_name_or_path: str | None = option(None, "another VAE than the base model's own")
    revision: str | None = option(None, "branch, tag or commit of the base model on the Hub")
    variant: str | None = option(None, "variant of the weight files, such as fp16")

    def validate(self) -> None:
        if not self.pretrained_model_name_or_path:
            raise OptionError("--pretrained_model_name_or_path: a value is required, a directory or a Hub name")


@dataclass
class DataOptions(ModelOptions):
    """Images and latents"""

    train_data_dir: str | None = option(
        None,
        "folder of images, with captions in metadata.jsonl, metadata.csv or .txt files; or of parquet or webdataset files",
    )
    dataset_name: str | None = option(None, "in its place, a data set that the datasets library loads from the Hub")
    dataset_config_name: str | None = option(None, "its configuration")
    dataset_split: str = option("train", "its split that is trained on")
    image_column: str = option("image", "its column of pictures")
    caption_column: str = option(
        "text", "column of the captions: a text, or a list of texts of which one is drawn each time the picture is shown"
    )
    t_n_column: str | None = option(
        None, "column of pictures' own noise levels, timesteps; -1 for clean, nothing for --t_n [default: --t_n for all]"
    )
    pre_noised: bool = option(
        False,
        "the folder holds noisy latents in place of images: .safetensors files with one tensor latent (4, h, w) each, as "
        "the UNet sees them, at --t_n or the level in --t_n_column",
    )
    instance_prompt: str | None = option(None, "caption for images that have none; without it they are skipped")
    resolution: int = option(1024, "side of the square that images are resized and cropped to, pixels", minimum=16)
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
    )
    center_crop: bool = option(True, "crop the middle; if false, a place drawn once per image")
    t_n: int | None = option(
        500,
        "noise level of the stored latents, a timestep; none = clean latents (nothing is protected)",
        minimum=0,
        maximum=MAXIMUM_T_N,
    )
    noise_key_file: str | None = option(
        None,
        "file with the key that the noise is made from, for a rebuild with the same noise; created with mode 600 if "
        "missing. By default the key is random and never written. Whoever has it can remove the noise",
    )
    allow_second_observation: bool = option(
        False, "draw new noise for images that a noisy store already holds; two draws can be averaged"
    )
    shard_size: int = option(256, "images or captions per stored file", minimum=1)

    def geometry(self):
        """How pictures are resized and cropped."""
        from sdxl_ambient.geometry import Geometry, parse_buckets

        buckets = parse_buckets(self.aspect_ratio_buckets, self.resolution, self.bucket_reso_steps)
        return Geometry(self.resolution, self.center_crop, buckets)

    def of_a_store(self) -> dict:
        """What :func:`sdxl_ambient.latents.build_store` is told, by its names."""
        where = ("dataset_name", "dataset_config_name", "dataset_split", "image_column", "caption_column", "t_n_column")
        how = ("t_n", "pre_noised", "instance_prompt", "near_duplicates", "noise_key_file")
        return {name: getattr(self, name) for name in (*where, *how, "allow_second_observation", "shard_size")}

    @property
    def has_images(self) -> bool:
        """Whether there are pictures to make a store of."""
        return self.train_data_dir is not None or self.dataset_name is not None

    def validate_data(self) -> None:
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
    """``python -m sdxl_ambient.latents``."""

    output_dir: str | None = option(None, "folder for the store")

    def validate(self) -> None:
        super().validate()
        if not self.has_images:
            raise OptionError("--train_data_dir: a value is required, a folder of images, or --dataset_name")
        self.validate_data()
        if not self.output_dir:
            raise OptionError("--output_dir: a value is required, a folder for the store")
        check_writable("output_dir", self.output_dir)
        self.validate_key(self.output_dir, self.train_data_dir)


@dataclass
class FolderOptions(DataOptions):
    """Folders and data of a run"""

    latents_dir: str | None = option(
        None, "store of noisy latents; made from the images if missing [default: OUTPUT_DIR/latents]"
    )
    heldout_data_dir: str | None = option(None, "folder of images kept out of training, for the held-out loss")
    heldout_split: str | None = option(None, "in its place, a split of --dataset_name")
    heldout_latents_dir: str | None = option(None, "their store [default: OUTPUT_DIR/latents_heldout]")
    clean_latents_dir: str | None = option(
        None,
        "store of clean latents, which decode to the images, for --low_noise clean alone; made from the images if missing "
        "[default: OUTPUT_DIR/latents_clean_unprotected]",
    )
    output_dir: str | None = option(None, "folder for the results")
    random_flip: bool = option(
        False,
        "mirror half of the stored noisy latents, drawn anew each time they are shown; VAEs are not symmetric, so that this "
        "costs some fidelity",
    )
    proportion_empty_prompts: float = option(
        0.0,
        "part of the samples that are shown without their caption, as the base model is without one",
        minimum=0,
        maximum=1,
    )


@dataclass
class TrainOptions(
    HubOptions, WatchOptions, LifeOptions, OptimizerOptions, LossOptions, WeightOptions, FolderOptions
):  # the help shows the last one first
    """``accelerate launch train_sdxl_ambient.py``."""

    def validate(self) -> None:
        super().validate()
        if not self.output_dir:
            raise OptionError("--output_dir: a value is required, a folder for the results")
        check_writable("output_dir", self.output_dir)
        if not self.has_images and not self.latents_dir:
            raise OptionError(
                "--train_data_dir: a folder of images is required, or --dataset_name, or a store (--latents_dir)"
            )
        self.validate_data()
        if self.latents_dir and not self.has_images and not (Path(self.latents_dir) / "manifest.json").is_file():
            raise OptionError(
                f"--latents_dir: {self.latents_dir!r} is not a finished store and there is no --train_data_dir"
            )
        self._validate_heldout()
        stores = (getattr(self, name) for name in _STORES)
        self.validate_key(self.output_dir, self.train_data_dir, *stores)
        self.validate_weights()
        self.validate_loss()
        self._validate_restore()
        self._validate_clean()
        self.validate_optimizer()
        self.validate_machine()
        self.validate_watching()
        self.validate_hub()
        self._validate_memorization()
        other = sorted({"early_stop", "hybrid"} & set(self.validation_sampler))
        if self.prompts and self.t_n is None and other:
            raise OptionError(f"--validation_sampler: {other[0]!r} needs a noise level; allowed at --t_n none is full")

    def _validate_heldout(self) -> None:
        if self.heldout_data_dir is not None and not Path(self.heldout_data_dir).is_dir():
            raise OptionError(f"--heldout_data_dir: {self.heldout_data_dir!r} is not a folder")
        if self.heldout_split is not None and self.dataset_name is None:
            raise OptionError(f"--heldout_split: {self.heldout_split!r} needs --dataset_name")
        if self.heldout_split is not None and self.heldout_data_dir is not None:
            raise OptionError(f"--heldout_split: {self.heldout_split!r} excludes --heldout_data_dir")
        for name in ("early_stopping", "max_denoising_gap"):
            if getattr(self, name) is not None and not self.has_heldout:
                raise OptionError(f"--{name}: {getattr(self, name):g} needs held-out images (--heldout_data_dir)")

    def _validate_restore(self) -> None:
        if self.low_noise != "skip" and self.t_n is None and self.has_images and self.t_n_column is None:
            raise OptionError(f"--low_noise: {self.low_noise!r} has nothing to do at --t_n none; allowed is skip")
        if self.low_noise == "restore" and self.aspect_ratio_buckets is not None:
            raise OptionError("--aspect_ratio_buckets: excludes --low_noise restore; allowed is skip, consistency")
        size = self.restored_per_batch
        if self.restore_refresh is not None and self.restore_refresh > size:
            raise OptionError(
                f"--restore_refresh: {self.restore_refresh} is more than the {size} restored samples of a forward pass"
            )

    def _validate_clean(self) -> None:
        if self.low_noise != "clean":
            return
        if self.pre_noised:
            raise OptionError("--pre_noised: true excludes --low_noise clean, which needs the images themselves")
        if self.aspect_ratio_buckets is not None:
            raise OptionError("--aspect_ratio_buckets: excludes --low_noise clean; allowed is skip, consistency")
        clean = self.stores["clean_latents_dir"]
        if not self.has_images and not (clean / "manifest.json").is_file():
            raise OptionError(
                f"--clean_latents_dir: {str(clean)!r} is not a finished store and there is no --train_data_dir"
            )
        for name in ("latents_dir", "heldout_latents_dir"):
            if clean.resolve().is_relative_to(self.stores[name].resolve()):
                raise OptionError(
                    f"--clean_latents_dir: {str(clean)!r} lies inside {str(self.stores[name])!r}, a store of noisy latents; "
                    "clean ones need a folder of their own"
                )

    def _validate_memorization(self) -> None:
        if self.memorization_every is None:
            return
        for name in ("train_data_dir", "heldout_data_dir"):
            if getattr(self, name) is None or self.pre_noised:
                raise OptionError(f"--memorization_every: {self.memorization_every} needs the images themselves (--{name})")

    @property
    def has_heldout(self) -> bool:
        """Whether there are held-out images or a store of them."""
        return any(v is not None for v in (self.heldout_data_dir, self.heldout_split, self.heldout_latents_dir))

    @property
    def stores(self) -> dict[str, Path]:
        """The folders of the stores by the options that place them, whether they are used or not."""
        return {name: Path(getattr(self, name) or Path(self.output_dir) / folder) for name, folder in _STORES.items()}

    @property
    def clean_per_batch(self) -> int:
        """Clean latents in a forward pass of ``--low_noise clean``."""
        return self.clean_batch_size or -(-self.train_batch_size // 2)

    @property
    def restored_per_batch(self) -> int:
        """Restored samples in a forward pass."""
        whole = self.restore_levels == "all"
        return self.restore_batch_size or (self.train_batch_size if whole else -(-self.train_batch_size // 2))

    def restore_options(self):
        """How samples are restored."""
        from sdxl_ambient.restoration import RestoreOptions

        refresh = self.restored_per_batch // 4 if self.restore_refresh is None else self.restore_refresh
        return RestoreOptions(self.restored_per_batch, refresh, self.restore_steps, self.restore_levels)

    def scalars(self) -> dict:
        """Options as trackers take them, without the place of the key."""
        flat = {k: ", ".join(v) if isinstance(v, list) else v for k, v in asdict(self).items() if k != "noise_key_file"}
        return {k: "none" if v is None else v for k, v in flat.items()}


def check_writable(name: str, folder: str) -> None:
    """A folder that can be made or written into; an OptionError else. Makes nothing."""
    path = Path(folder).resolve()
    if path.exists() and not path.is_dir():
        raise OptionError(f"--{name}: {folder!r} is a file, a folder is needed")
    while not path.exists():
        path = path.parent
    if not path.is_dir() or not os.access(path, os.W_OK):
        raise OptionError(f"--{name}: {folder!r} can not be written to")
