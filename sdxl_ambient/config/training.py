"""Every option of encoding and training, with its type, default, range and help. Names are the diffusers examples'."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from sdxl_ambient.config.data import KEY_OPTIONS, DataOptions
from sdxl_ambient.config.groups import (
    HubOptions,
    LifeOptions,
    LossOptions,
    OptimizerOptions,
    WatchOptions,
    WeightOptions,
)
from sdxl_ambient.config.parser import APPLIED, FREE, option
from sdxl_ambient.config.shared import check_outside, check_writable
from sdxl_ambient.errors import OptionError

# Stores within --output_dir that no option places elsewhere.
_STORES = {
    "latents_dir": "latents",
    "heldout_latents_dir": "latents_heldout",
    "clean_latents_dir": "latents_clean_unprotected",
}


@dataclass
class FolderOptions(DataOptions):
    """Folders and data of a run"""

    latents_dir: str | None = option(
        None,
        "store of noisy latents; made from the images if missing [default: OUTPUT_DIR/latents]",
        resume=APPLIED,
    )
    heldout_data_dir: str | None = option(
        None, "folder of images kept out of training, for the held-out loss", resume=APPLIED
    )
    heldout_split: str | None = option(None, "in its place, a split of --dataset_name", resume=APPLIED)
    heldout_latents_dir: str | None = option(None, "their store [default: OUTPUT_DIR/latents_heldout]", resume=APPLIED)
    clean_latents_dir: str | None = option(
        None,
        "store of clean latents, which decode to the images, for --low_noise clean alone; made from the images if missing "
        "[default: OUTPUT_DIR/latents_clean_unprotected]",
        resume=APPLIED,
    )
    output_dir: str = option(None, "folder for the results", resume=FREE)
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
    """``accelerate launch train_sdxl_ambient.py``"""

    def validate(self) -> None:
        super().validate()
        if not self.output_dir:
            raise OptionError("--output_dir: a value is required, a folder for the results")
        check_writable("output_dir", self.output_dir)
        sources = {name: getattr(self, name) for name in ("train_data_dir", "heldout_data_dir")}
        check_outside("output_dir", self.output_dir, **sources)
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
        if self.heldout_split is not None and not self.has_images:
            raise OptionError(f"--heldout_split: {self.heldout_split!r} needs --dataset_name or --train_data_dir")
        if self.heldout_split is not None and self.heldout_split == self.dataset_split:
            raise OptionError(f"--heldout_split: {self.heldout_split!r} is the split that is trained on")
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

    def scalars(self) -> dict:
        """Options as trackers take them, without the place of the key."""
        flat = {k: ", ".join(v) if isinstance(v, list) else v for k, v in asdict(self).items() if k not in KEY_OPTIONS}
        return {k: "none" if v is None else v for k, v in flat.items()}
