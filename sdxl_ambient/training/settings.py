"""Options → the settings of a run's parts, which know no options.

With setup.py this is the part of a run's set-up that sees the options; the settings' classes lie beside what uses them.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from sdxl_ambient.config.parser import APPLIED
from sdxl_ambient.config.settings import settings_of
from sdxl_ambient.config.training import TrainOptions
from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.objective import ObjectiveOptions
from sdxl_ambient.store.settings import StoreSettings
from sdxl_ambient.training.dry_run import DryRunSettings
from sdxl_ambient.training.heldout_loss import BandSettings
from sdxl_ambient.training.posterior_buffer import RestoreOptions
from sdxl_ambient.training.record import RunRecordSettings
from sdxl_ambient.training.samples import SamplerSettings
from sdxl_ambient.training.stores import StoresSettings
from sdxl_ambient.training.validation import ValidationSettings
from sdxl_ambient.training.weights import BaseModel


def stores_settings(options: TrainOptions) -> StoresSettings:
    """Which stores a run has: always that of noisy latents; the others where held-out images or clean latents are used."""
    stores, buckets = options.stores, (options.aspect_ratio_buckets, options.bucket_reso_steps)
    geometry = Geometry.parse(options.resolution, options.center_crop, *buckets)
    return settings_of(
        StoresSettings,
        options,
        base=settings_of(BaseModel, options),
        latents_dir=stores["latents_dir"],
        heldout_latents_dir=stores["heldout_latents_dir"] if options.has_heldout else None,
        clean_latents_dir=stores["clean_latents_dir"] if options.low_noise == "clean" else None,
        store=settings_of(StoreSettings, options, geometry=geometry, keep_tokens=options.train_text_encoder),
    )


def objective_settings(options: TrainOptions) -> ObjectiveOptions:
    """The objective's options, which have the flags' names but for those that depend on another flag."""
    given = {f.name: getattr(options, f.name) for f in fields(ObjectiveOptions) if hasattr(options, f.name)}
    if options.consistency_weight is None:
        given["consistency_weight"] = 2.0 if options.low_noise == "consistency" else 0.0
    if options.low_noise == "clean":
        given["restore_weight"] = options.clean_weight  # clean rows stand where restored ones do
    weightings = {
        "min_snr": options.snr_gamma,
        "balanced": options.balance_cap,
        "debiased": options.debiased_estimation_loss,
    }
    given["weighting"] = next((name for name, value in weightings.items() if value), "none")
    given["snr_gamma"] = options.snr_gamma or ObjectiveOptions.snr_gamma
    given["balance_cap"] = options.balance_cap or ObjectiveOptions.balance_cap
    return ObjectiveOptions(**given)


def restore_settings(options: TrainOptions) -> RestoreOptions:
    """How samples are restored; a quarter of a forward pass's samples is drawn anew where nothing is said."""
    count = options.restored_per_batch
    refresh = count // 4 if options.restore_refresh is None else options.restore_refresh
    return RestoreOptions(count, refresh, options.restore_steps, options.restore_levels)


def applied_options(options: TrainOptions) -> dict[str, Any]:
    """The values of the options that may change on resume, and then count."""
    names = [field.name for field in fields(options) if field.metadata["resume"] == APPLIED]
    return {name: getattr(options, name) for name in names}


def run_record_settings(options: TrainOptions) -> RunRecordSettings:
    """What a resume must agree in."""
    return settings_of(
        RunRecordSettings,
        options,
        objective=objective_settings(options),
        restore=restore_settings(options) if options.low_noise == "restore" else None,
        optimizer=options.optimizer_name,
    )


def validation_settings(options: TrainOptions) -> ValidationSettings:
    """What is looked at between steps."""
    return settings_of(
        ValidationSettings,
        options,
        drawing=settings_of(SamplerSettings, options, base=settings_of(BaseModel, options)),
        bands=BandSettings(options.heldout_bands, options.train_batch_size, options.loss_space),
    )


def dry_run_settings(options: TrainOptions) -> DryRunSettings:
    """What a dry run needs beside the run; ``--low_noise`` decides how many rows it adds, and whether they take all."""
    rows = {"restore": options.restored_per_batch, "clean": options.clean_per_batch}
    return settings_of(
        DryRunSettings,
        options,
        base=settings_of(BaseModel, options),
        extra_rows=rows.get(options.low_noise, 0),
        replace_noisy=options.low_noise == "restore" and options.restore_levels == "all",
        optimizer=options.optimizer_name,
    )
