"""Builds what a run is made of, from its options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LRScheduler

from sdxl_ambient.config.data import KEY_OPTIONS
from sdxl_ambient.config.settings import settings_of
from sdxl_ambient.config.training import TrainOptions
from sdxl_ambient.models.base import check_sdxl, load_schedule
from sdxl_ambient.models.denoiser import Conditioning
from sdxl_ambient.provenance import environment, write_json
from sdxl_ambient.store.batches import Batch, small_groups
from sdxl_ambient.store.checks import check_stores, format_store_levels
from sdxl_ambient.store.reader import Presentation
from sdxl_ambient.training.checkpoint import refuse_to_overwrite, register_lora_hooks
from sdxl_ambient.training.clean_levels import CleanLevels
from sdxl_ambient.training.distributed import ShardingSettings, check_sharding, is_sharded, tell_deepspeed
from sdxl_ambient.training.ema import EMA
from sdxl_ambient.training.interruption import Interruption, Skipped
from sdxl_ambient.training.model import TrainableModel, load_trainable
from sdxl_ambient.training.optimizers import FusedBackward, make_optimizer, parse_extra
from sdxl_ambient.training.posterior_buffer import PosteriorBuffer, Teacher
from sdxl_ambient.training.record import InfoSettings, run_record
from sdxl_ambient.training.run import Data, Run, RunSettings, max_train_steps, samples_per_step
from sdxl_ambient.training.settings import (
    applied_options,
    objective_settings,
    restore_settings,
    run_record_settings,
    stores_settings,
    validation_settings,
)
from sdxl_ambient.training.stores import open_store, open_stores
from sdxl_ambient.training.validation import Validation
from sdxl_ambient.training.weights import BaseModel, WeightSettings


def prepare_process(options: TrainOptions, accelerator: Accelerator) -> None:
    """Check what can be checked before anything is loaded, and seed this process.

    Raises:
        OptionError: results of an earlier run in the folder, or options that can't be had with spread weights.
    """
    refuse_to_overwrite(options.output_dir, options.resume_from_checkpoint)
    check_sharding(settings_of(ShardingSettings, options), accelerator)
    set_seed(options.seed)
    if options.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    tell_deepspeed(
        accelerator,
        batch_size=options.train_batch_size,
        samples_per_step=samples_per_step(settings_of(RunSettings, options), accelerator),
        max_grad_norm=options.max_grad_norm,
    )


def open_data(options: TrainOptions, accelerator: Accelerator, interruption: Interruption) -> Data:
    """The stores, made first where images are given, and the base model's noise schedule.

    Raises:
        ModelError, ImagesMissing, StoreError, NoiseKeyError: with one line that says what is wrong.
        Interrupted: told to stop while images are encoded.
    """
    base, predicts = options.pretrained_model_name_or_path, options.prediction_type
    index = check_sdxl(base, options.revision, accelerator.print, predicts)
    zero_empty = index.get("force_zeros_for_empty_prompt", True)
    schedule = load_schedule(base, options.revision, predicts)
    presentation = Presentation(options.seed, options.random_flip, options.proportion_empty_prompts, zero_empty)
    store, heldout = open_stores(stores_settings(options), accelerator, schedule, presentation, interruption.check)
    for line in check_stores(store, heldout, schedule, options.low_noise):
        accelerator.print(line)
    return Data(store, heldout, schedule, presentation)


def build_model(options: TrainOptions, accelerator: Accelerator, data: Data) -> TrainableModel:
    """The weights that are trained.

    Raises:
        ModelError, InterchangeError: with one line that says what of the base model or of ``--lora`` is wrong.
    """
    base, weights = settings_of(BaseModel, options), settings_of(WeightSettings, options)
    return load_trainable(base, weights, accelerator, data.schedule, data.presentation.zero_empty)


def build_optimizer(options: TrainOptions, accelerator: Accelerator, model: TrainableModel) -> torch.optim.Optimizer:
    """The optimizer of the model's weights, which steps within the backward pass with ``--fused_backward_pass``."""
    scale = samples_per_step(settings_of(RunSettings, options), accelerator) if options.scale_lr else 1

    def make(groups: list[dict]) -> torch.optim.Optimizer:
        return make_optimizer(
            options.optimizer_name,
            groups,
            lr=options.learning_rate * scale,
            betas=(options.adam_beta1, options.adam_beta2),
            weight_decay=options.adam_weight_decay,
            epsilon=options.adam_epsilon,
            warmup_steps=options.lr_warmup_steps,
            extra=parse_extra(options.optimizer_args),
        )

    groups = model.groups(options.text_encoder_lr, scale)
    return FusedBackward(make, groups, model.names) if options.fused_backward_pass else make(groups)


def build_lr_scheduler(
    options: TrainOptions, accelerator: Accelerator, data: Data, optimizer: torch.optim.Optimizer
) -> LRScheduler:
    """The learning rate over the optimizer steps of the whole run.

    It is stepped by hand. Accelerate would advance one that it prepared once per process.
    """
    return get_scheduler(
        options.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=0 if options.optimizer == "adamw_schedulefree" else options.lr_warmup_steps,
        num_training_steps=max_train_steps(settings_of(RunSettings, options), accelerator, data.store),
        num_cycles=options.lr_num_cycles,
        power=options.lr_power,
    )


def build_average(options: TrainOptions, model: TrainableModel) -> EMA | None:
    """Averaged weights, where they are exported, teach, or draw restored samples."""
    draws = options.low_noise == "restore" and options.restore_teacher != "base"
    if options.use_ema or options.consistency_teacher == "ema" or draws:
        return EMA(model.modules, options.ema_decay, options.offload_ema)
    return None


def condition_of(model: TrainableModel, accelerator: Accelerator) -> Callable[[Batch], Conditioning]:
    """A batch → what the UNet is shown of it, on the device."""
    return lambda batch: model.conditioning(batch, accelerator.device)


def build_extra(
    options: TrainOptions, accelerator: Accelerator, data: Data, model: TrainableModel
) -> PosteriorBuffer | CleanLevels | None:
    """The rows that ``--low_noise`` trains at t ≤ t_n; those that are restored get their teacher in :func:`set_up`.

    Raises:
        StoreError: a store that such rows can't be made from.
    """
    place = options.seed, accelerator.process_index, accelerator.num_processes
    if options.low_noise == "restore":
        return PosteriorBuffer(data.store, restore_settings(options), *place)
    if options.low_noise == "clean":
        latents = open_store(options.stores["clean_latents_dir"], accelerator, data.presentation)
        return CleanLevels(latents, data.store, options.clean_per_batch, *place, condition_of(model, accelerator))
    return None


def set_up(
    options: TrainOptions,
    accelerator: Accelerator,
    data: Data,
    model: TrainableModel,
    optimizer: AcceleratedOptimizer,
    lr_scheduler: LRScheduler,
    quick: Callable[[Path], dict] | None = None,
) -> Run:
    """What remains to be built once the model and the optimizer are prepared. ``quick``: see :class:`Validation`.

    What a checkpoint holds is registered here, always in the same order: learning rate, averages, first weights.
    """
    accelerator.register_for_checkpointing(lr_scheduler)
    if options.finetune == "lora" and not is_sharded(accelerator):
        register_lora_hooks(accelerator, model.unet, model.text_encoders or None)
    extra = build_extra(options, accelerator, data, model)  # before the averages, since it may refuse
    average = teacher = build_average(options, model)
    if average is not None:
        accelerator.register_for_checkpointing(average)
    if options.low_noise == "restore" and options.restore_teacher == "base":
        teacher = EMA(model.modules, options.ema_decay)  # never updated: the weights that training started from
        accelerator.register_for_checkpointing(teacher)
    if isinstance(extra, PosteriorBuffer) and teacher is not None:
        extra.teacher = Teacher(teacher, data.schedule, condition_of(model, accelerator), model.dtype, options.restore_start)
    settings = settings_of(RunSettings, options)
    more = extra.record if isinstance(extra, CleanLevels) else {}
    more |= {"mixed_precision": accelerator.mixed_precision}
    samples = samples_per_step(settings, accelerator)
    watched = data.schedule, data.store, data.heldout
    return Run(
        settings=settings,
        info=settings_of(InfoSettings, options),
        accelerator=accelerator,
        data=data,
        model=model,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        objective=objective_settings(options),
        extra=extra,
        average=average,
        validation=Validation(validation_settings(options), accelerator, model, *watched, quick),
        skipped=Skipped(options.max_skipped_steps),
        record=run_record(run_record_settings(options), data.store, samples, model.record | more),
        applied=applied_options(options),
    )


def announce(options: TrainOptions, run: Run, first: int) -> None:
    """Write down the options, open the trackers, and say what will be trained after ``first`` steps."""
    accelerator, store = run.accelerator, run.data.store
    if accelerator.is_main_process:
        shared = {k: v for k, v in asdict(options).items() if k not in KEY_OPTIONS}
        write_json(run.output / "options.json", {"options": shared, "environment": environment()})
    if options.report_to != "none":
        accelerator.init_trackers("sdxl_ambient", config=options.scalars())
    accelerator.print(
        f"Training {run.model.trained:,} weights ({options.finetune}) on {len(store)} images at t_n = "
        f"{format_store_levels(store)}: steps {first} to {run.max_train_steps}, {run.samples_per_step} samples each."
    )
    for line in small_groups(store.groups, run.samples_per_step // options.gradient_accumulation_steps):
        accelerator.print(line)
