#!/usr/bin/env python
"""Fine-tune Stable Diffusion XL (LoRA or the full UNet) on noisy latents.

    accelerate launch train_sdxl_ambient.py --config_file configs/mini_lora.yaml [--flag value …]

Images become noisy latents once, before training (``python -m sdxl_ambient.latents`` does the same alone); from then on
nothing clean is read, unless ``--low_noise clean`` asks for it. Every option is described by ``--help`` and in
docs/OPTIONS.md.
"""

from __future__ import annotations

import datetime
import logging
import math
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, gather_object, set_seed
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm

from sdxl_ambient.config.parser import parse_options
from sdxl_ambient.config.training import TrainOptions
from sdxl_ambient.errors import (
    CheckpointError,
    HubError,
    ImagesMissing,
    InterchangeError,
    ModelError,
    NoiseKeyError,
    OptionError,
    StoreError,
)
from sdxl_ambient.hub.upload import check_hub, push, repository
from sdxl_ambient.models.denoiser import Denoiser
from sdxl_ambient.models.load import check_sdxl, load_schedule
from sdxl_ambient.objective import ambient_objective
from sdxl_ambient.provenance import environment, write_json
from sdxl_ambient.store.batches import Stream, loader, small_groups
from sdxl_ambient.store.checks import check_stores, format_store_levels
from sdxl_ambient.store.reader import LatentStore, Presentation
from sdxl_ambient.training.checkpoint import refuse_to_overwrite, register_lora_hooks, save_checkpoint
from sdxl_ambient.training.clean_levels import CleanLevels
from sdxl_ambient.training.distributed import as_number, check_sharding, full_state, is_sharded, tell_deepspeed
from sdxl_ambient.training.dry_run import dry_run
from sdxl_ambient.training.ema import EMA
from sdxl_ambient.training.interruption import Interrupted, Interruption, Rescue, Skipped, not_finite, overflowed
from sdxl_ambient.training.model import load_trainable
from sdxl_ambient.training.optimizers import FusedBackward, evaluated, make_optimizer, parse_extra
from sdxl_ambient.training.posterior_buffer import PosteriorBuffer
from sdxl_ambient.training.progress import ProgressMeter
from sdxl_ambient.training.resume import find_start, run_record, training_info
from sdxl_ambient.training.stores import open_stores
from sdxl_ambient.training.validation import Validation

logger = get_logger(__name__)
USER_ERRORS = (
    OptionError, ImagesMissing, StoreError, NoiseKeyError, ModelError, CheckpointError, InterchangeError, HubError
)  # fmt: skip


class TrainingError(RuntimeError):
    """Training that can't go on, since gradients are no numbers step after step. Checkpoints stay."""


def main(argv: list[str] | None = None) -> int:
    options = parse_options(TrainOptions, argv, prog="train_sdxl_ambient.py", description=__doc__)
    accelerator = Accelerator(
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        mixed_precision=options.mixed_precision,
        log_with=None if options.report_to == "none" else options.report_to,
        project_config=ProjectConfiguration(
            project_dir=options.output_dir, logging_dir=str(Path(options.output_dir) / options.logging_dir)
        ),
        # Encoding and validation may keep one process waiting for longer than the usual ten minutes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(hours=6))],
    )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    for noisy in ("httpx", "accelerate.checkpointing", "accelerate.accelerator"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    interruption = Interruption(options.time_limit)
    try:
        with interruption, ExitStack() as stack:
            train(options, accelerator, interruption, stack)
    except Interrupted as reason:
        accelerator.print(f"\nStopped by {reason} before the first step. What is encoded stays; the same command goes on.")
    except (*USER_ERRORS, TrainingError, FloatingPointError, OSError) as error:
        if accelerator.is_main_process:
            print(f"train_sdxl_ambient.py: error: {error}", file=sys.stderr)
        return 2
    finally:
        accelerator.end_training()
    return interruption.exit_code


def train(options: TrainOptions, accelerator: Accelerator, interruption: Interruption, stack: ExitStack) -> None:
    output, log = Path(options.output_dir), accelerator.print
    refuse_to_overwrite(output, options.resume_from_checkpoint)
    check_sharding(options, accelerator)
    hub = repository(options.hub_model_id, output) if options.push_to_hub else None
    if hub and accelerator.is_main_process:
        hub = check_hub(hub, options.hub_private)
    set_seed(options.seed)
    if options.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    accumulation = options.gradient_accumulation_steps
    samples_per_step = options.train_batch_size * accelerator.num_processes * accumulation
    tell_deepspeed(
        accelerator,
        batch_size=options.train_batch_size,
        samples_per_step=samples_per_step,
        max_grad_norm=options.max_grad_norm,
    )

    look = quick_look(options, accelerator, stack)  # first, since it may refuse

    # -- data and models ----------------------------------------------------------------------------------------------

    base = options.pretrained_model_name_or_path
    zero_empty = check_sdxl(base, options.revision).get("force_zeros_for_empty_prompt", True)
    schedule = load_schedule(base, options.revision)
    presentation = Presentation(options.seed, options.random_flip, options.proportion_empty_prompts, zero_empty)
    store, heldout = open_stores(options, accelerator, schedule, presentation, interruption.check)
    for line in check_stores(store, heldout, schedule, options.low_noise):
        log(line)
    trainable = load_trainable(options, accelerator, zero_empty)
    trained = trainable.trained

    # -- optimizer ----------------------------------------------------------------------------------------------------

    def optimizer_of(groups):
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

    scale = samples_per_step if options.scale_lr else 1
    groups = trainable.groups(options.text_encoder_lr, scale)
    fused = options.fused_backward_pass
    optimizer = FusedBackward(optimizer_of, groups, trainable.names) if fused else optimizer_of(groups)
    max_train_steps = options.max_train_steps or math.ceil(options.num_train_epochs * len(store) / samples_per_step)
    # Counted in optimizer steps and stepped by hand: prepared, it would advance once per process.
    lr_scheduler = get_scheduler(
        options.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=0 if options.optimizer == "adamw_schedulefree" else options.lr_warmup_steps,
        num_training_steps=max_train_steps,
        num_cycles=options.lr_num_cycles,
        power=options.lr_power,
    )
    unet, *encoders, optimizer = accelerator.prepare(*trainable.modules, optimizer)
    trainable.encoders = tuple(encoders)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]  # sharding has replaced them
    accelerator.register_for_checkpointing(lr_scheduler)
    sharded = is_sharded(accelerator)
    if options.finetune == "lora" and not sharded:
        register_lora_hooks(accelerator, trainable.unet, trainable.text_encoders or None)

    # -- averages, rows for t ≤ t_n, resume ---------------------------------------------------------------------------

    objective = options.objective()
    restoration = clean = None
    mine = options.seed, accelerator.process_index, accelerator.num_processes
    if options.low_noise == "restore":
        restoration = PosteriorBuffer(store, options.restore_options(), *mine)
    if options.low_noise == "clean":
        latents = LatentStore(options.stores["clean_latents_dir"], presentation=presentation)
        clean = CleanLevels(latents, store, options.clean_per_batch, *mine)
    low = restoration or clean  # gives each forward pass rows that follow the noisy ones
    # Averaged weights are what is exported, or draw the samples of restore's and the consistency loss's reverse steps.
    first_round = restoration and options.restore_teacher == "base"
    average = start = None
    if options.use_ema or options.consistency_teacher == "ema" or (restoration and not first_round):
        average = EMA(trainable.modules, options.ema_decay, options.offload_ema)
        accelerator.register_for_checkpointing(average)
    if first_round:
        start = EMA(trainable.modules, options.ema_decay)  # never updated: the weights that training started from
        accelerator.register_for_checkpointing(start)
    skipped = Skipped(options.max_skipped_steps)
    validation = Validation(options, accelerator, trainable, schedule, store, heldout, look)
    run = run_record(options, store, samples_per_step, trainable.record | (clean.record if clean else {}))
    progress = {"step": 0, "run": run, "processes": accelerator.num_processes}
    if found := find_start(output, options, run, accelerator, sharded):
        folder, progress = found
        accelerator.load_state(str(folder))
        skipped.load_state_dict(progress["skipped"])
        validation.load_state_dict(progress)
        if restoration:
            restoration.load(folder)
        log(f"Resuming from {folder}.")
        progress.update(run=run, processes=accelerator.num_processes)
    if accelerator.is_main_process:
        record = {k: v for k, v in asdict(options).items() if k != "noise_key_file"}
        write_json(output / "options.json", {"options": record, "environment": environment()})
    if options.report_to != "none":
        accelerator.init_trackers("sdxl_ambient", config=options.scalars())

    # -- loop ---------------------------------------------------------------------------------------------------------

    def shown(batch):
        return trainable.conditioning(batch, accelerator.device)

    def evaluating():
        """The weights that are exported and validated, which may be averages."""
        return average.weights() if options.use_ema else evaluated(optimizer)

    def export(folder: Path, step: int) -> None:
        """Write the weights as they are now: within ``evaluating()``, those that are meant to be used."""
        state = full_state(accelerator, unet)
        if accelerator.is_main_process:
            trainable.export(folder, training_info(options, store, schedule, step), state)

    def save(step: int) -> None:
        def more(folder: Path) -> None:
            if restoration:
                restoration.save(folder)
            if sharded and options.finetune == "lora":
                export(folder, step)

        progress.update(step=step, skipped=skipped.state_dict(), **validation.state_dict())
        info = training_info(options, store, schedule, step)
        with evaluated(optimizer):
            save_checkpoint(accelerator, output, step, progress, options.checkpoints_total_limit, more, info)

    first = progress["step"]
    log(
        f"Training {trained:,} weights ({options.finetune}) on {len(store)} images at t_n = {format_store_levels(store)}: "
        f"steps {first} to {max_train_steps}, {samples_per_step} samples each."
    )
    for line in small_groups(store.groups, samples_per_step // accumulation):
        log(line)
    stream = Stream(
        len(store),
        options.train_batch_size,
        options.seed,
        start=first * accumulation,
        stop=max(first, max_train_steps) * accumulation,
        rank_and_size=(accelerator.process_index, accelerator.num_processes),
        groups=list(store.groups.values()),
    )
    if options.dry_run:
        epochs = max_train_steps * samples_per_step / len(store)
        plan = {"steps": max_train_steps, "samples_per_step": samples_per_step, "epochs": epochs, "trained": trained}
        dry_run(options, accelerator, trainable, schedule, store, stream, objective, plan)
        return
    extras = low.batches(stream.start, stream.stop, options.dataloader_num_workers) if low else None
    with evaluating():
        validation.begin(unet)
    meter = ProgressMeter(samples_per_step, max_train_steps, first, device=accelerator.device)
    bar = tqdm(
        total=max_train_steps, initial=first, desc="steps", unit="step", disable=not accelerator.is_local_main_process
    )
    step, summed, seen, total = first, {}, [], 0.0
    rescue = stack.enter_context(Rescue(accelerator, save, first, common=TrainingError))
    for batch in loader(store, stream, options.dataloader_num_workers):
        with accelerator.accumulate(unet, *encoders):
            generators, restored = batch.generators(options.seed), None
            extra = next(extras) if low else None
            denoise = Denoiser(unet, shown(batch), trainable.dtype)
            if clean or (restoration and step >= options.restore_start):
                drawn, shown_extra = low.generators(extra), shown(extra)
                if clean:
                    restored = clean.restored(extra)
                else:
                    model = Denoiser(start or average, shown_extra, trainable.dtype)
                    restored = restoration.restored(extra, model, schedule, drawn)
                    batch = batch.first(0) if options.restore_levels == "all" else batch
                generators = [*generators[: len(batch.x_n)], *drawn]
                denoise = Denoiser(
                    unet, denoise.conditioning.rows(slice(len(batch.x_n))).followed_by(shown_extra), trainable.dtype
                )
            teacher = None
            if options.consistency_teacher == "ema":
                teacher = Denoiser(average, denoise.conditioning, trainable.dtype)
            due = step >= options.consistency_start and step % options.consistency_every == 0
            asked = objective if due else replace(objective, consistency_weight=0.0)
            x_n = batch.x_n.to(accelerator.device)
            losses = ambient_objective(denoise, schedule, x_n, batch.t_n, generators, asked, restored, teacher)
            seen += [(batch.contents, losses.ambient), (extra.contents if restored is not None else [], losses.restored)]
            total = total + losses.total.detach()
            if fused and not math.isfinite(total):
                raise FloatingPointError(f"step {step + 1}: the loss is {float(losses.total)}; lower --learning_rate")
            rescue.whole = not fused  # it changes the weights in the backward pass
            accelerator.backward(losses.total)
            if accelerator.sync_gradients:
                norm = None
                if not fused:
                    norm = as_number(accelerator.clip_grad_norm_(parameters, options.max_grad_norm or math.inf))
                finite = norm is None or math.isfinite(norm)
                if not finite:  # in all processes
                    images, broken = gather_object(not_finite(seen)), gather_object([not math.isfinite(total)])
                    finite = overflowed(accelerator.scaler, any(broken))
                    if not finite and skipped.note(images):
                        raise TrainingError(f"{skipped}, {skipped.in_a_row} of them in a row; lower --learning_rate")
                rescue.whole = not finite and not fused
            # A gradient scaler must see every step; it leaves those out by itself.
            if not accelerator.sync_gradients or finite or accelerator.scaler is not None:
                optimizer.step()
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                lr_scheduler.step()
                if finite and average:
                    average.update()
            optimizer.zero_grad()
        stop = torch.tensor(float(interruption.reason is not None), device=accelerator.device)
        for name, value in accelerator.gather({**losses.means(), "stop": stop}).items():
            summed[name] = summed.get(name, 0.0) + float(value.mean()) / accumulation
        if not accelerator.sync_gradients:
            continue
        step, logged, summed, seen, total = step + 1, summed, {}, [], 0.0
        told_to_stop = logged.pop("stop") > 0
        if finite:
            skipped.passed()
        else:
            log(f"\nstep {step}: left out; so far {skipped}")
        if restoration:
            restoration.commit()
        rescue.finished(step)
        meter.step()
        bar.update()
        rate = lr_scheduler.get_last_lr()[0]
        bar.set_postfix({k: f"{v:.4f}" for k, v in logged.items()}, lr=f"{rate:.2e}", **meter.postfix())
        accelerator.log({**logged, "lr": rate, **meter.scalars()}, step=step)

        last = step == max_train_steps
        with meter.pause():
            enough = None
            if validation.due(step, last):
                with evaluating():
                    enough = validation.run(unet, step, last, export)
            if step % options.checkpointing_steps == 0 or last or told_to_stop or enough:
                rescue.save(step)
        if enough:
            log(f"\nStopped after step {step}: {enough}.")
            break
        if told_to_stop and not last:
            reason = interruption.reason or "another process, which was told to stop"
            log(f"\nStopped by {reason} after step {step}; --resume_from_checkpoint latest goes on from here.")
            return
    bar.close()

    # -- save ---------------------------------------------------------------------------------------------------------

    accelerator.wait_for_everyone()
    with evaluating():
        export(output, step)
    log(f"Saved {output}")
    if validation.best:
        log(f"Lowest held-out loss {validation.best[1]:.4f} at step {validation.best[0]}: {output / 'best'}")
    if hub and accelerator.is_main_process:
        push(output, repo_id=hub, private=options.hub_private, license=options.hub_license,
             report=options.memorization_report, log=log)  # fmt: skip


def quick_look(options: TrainOptions, accelerator: Accelerator, stack: ExitStack):
    """The evaluation's fast path, where it is asked for; what it computes of the clean images stays in memory."""
    if options.memorization_every is None or not accelerator.is_main_process:
        return None
    from eval.quick import QuickLook

    folder = stack.enter_context(tempfile.TemporaryDirectory())
    sets = options.train_data_dir, options.heldout_data_dir
    look = QuickLook(*sets, folder, options.memorization_embedder, caption_column=options.caption_column)
    look.prepare()
    return look


if __name__ == "__main__":
    raise SystemExit(main())
