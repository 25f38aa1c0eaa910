#!/usr/bin/env python
"""Fine-tune Stable Diffusion XL (LoRA or the full UNet) on noisy latents.

    accelerate launch train_sdxl_ambient.py --config_file configs/mini_lora.yaml [--flag value …]

Images become noisy latents once, before training (``python -m sdxl_ambient.latents`` does the same alone); from then on
nothing clean is read. Every option is described by ``--help`` and in docs/OPTIONS.md.
"""

from __future__ import annotations

import datetime
import logging
import math
import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, gather_object, set_seed
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm

from sdxl_ambient.averaging import Average
from sdxl_ambient.checkpoint import (
    CheckpointError,
    check_checkpoint,
    find_checkpoint,
    refuse_to_overwrite,
    register_lora_hooks,
    save_checkpoint,
    save_lora,
    save_unet,
)
from sdxl_ambient.config import OptionError, parse_options
from sdxl_ambient.data import Stream, check_stores, common_t_n, loader
from sdxl_ambient.images import ImagesMissing
from sdxl_ambient.interruption import Interruption, Rescue, Skipped, not_finite
from sdxl_ambient.lora import add_lora, trainable_to_float32
from sdxl_ambient.manifest import differences, environment, write_json
from sdxl_ambient.models import Denoiser, ModelError, check_sdxl, load_schedule, load_unet
from sdxl_ambient.objective import ambient_objective
from sdxl_ambient.observation import NoiseKeyError
from sdxl_ambient.options import TrainOptions
from sdxl_ambient.plan import StoreError
from sdxl_ambient.restoration import Restoration, RestoreOptions
from sdxl_ambient.stores import open_stores
from sdxl_ambient.validation import heldout_loss, track_images, validation_images

logger = get_logger(__name__)
USER_ERRORS = (OptionError, ImagesMissing, StoreError, NoiseKeyError, ModelError, CheckpointError)


class TrainingError(RuntimeError):
    """Training that can't go on, since gradients are no numbers step after step. Checkpoints stay."""


def optimizer_class(options: TrainOptions):
    if options.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit
    return torch.optim.AdamW


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
    except (*USER_ERRORS, TrainingError, FloatingPointError, OSError) as error:
        if accelerator.is_main_process:
            print(f"train_sdxl_ambient.py: error: {error}", file=sys.stderr)
        return 2
    finally:
        accelerator.end_training()
    return interruption.exit_code


def train(options: TrainOptions, accelerator: Accelerator, interruption: Interruption, stack: ExitStack) -> None:
    output = Path(options.output_dir)
    refuse_to_overwrite(output, options.resume_from_checkpoint)
    set_seed(options.seed)
    if options.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True

    # -- models and data ----------------------------------------------------------------------------------------------

    base = options.pretrained_model_name_or_path
    check_sdxl(base, options.revision)
    schedule = load_schedule(base, options.revision)
    store, heldout = open_stores(options, accelerator, schedule)
    check_stores(store, heldout, schedule, options.low_noise)

    lora = options.finetune == "lora"
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision)
    # Frozen weights may be half; weights that are trained are float32 and autocast in the forward pass.
    dtype = half if lora and half else torch.float32
    unet = load_unet(base, dtype=dtype, revision=options.revision, variant=options.variant)
    if lora:
        add_lora(
            unet,
            rank=options.rank,
            alpha=options.lora_alpha or options.rank,
            targets=options.lora_targets,
            dropout=options.lora_dropout,
            use_dora=options.use_dora,
        )
    else:
        unet.requires_grad_(True)
        trainable_to_float32(unet)
    if options.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    if options.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()

    # -- optimizer ----------------------------------------------------------------------------------------------------

    parameters = [p for p in unet.parameters() if p.requires_grad]
    samples_per_step = options.train_batch_size * accelerator.num_processes * options.gradient_accumulation_steps
    optimizer = optimizer_class(options)(
        parameters,
        lr=options.learning_rate * (samples_per_step if options.scale_lr else 1),
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.adam_weight_decay,
        eps=options.adam_epsilon,
    )
    max_train_steps = options.max_train_steps or math.ceil(options.num_train_epochs * len(store) / samples_per_step)
    # Counted in optimizer steps and stepped by hand: prepared, it would advance once per process.
    lr_scheduler = get_scheduler(
        options.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=max_train_steps,
        num_cycles=options.lr_num_cycles,
        power=options.lr_power,
    )
    model = unet
    unet, optimizer = accelerator.prepare(unet, optimizer)
    accelerator.register_for_checkpointing(lr_scheduler)
    if lora:
        register_lora_hooks(accelerator, model)

    # -- resume -------------------------------------------------------------------------------------------------------

    objective = options.objective()
    # Averaged weights draw the samples that restore trains on, and the consistency loss's where that is asked for.
    average, restoration = None, None
    if options.low_noise == "restore":
        refresh = options.restored_per_batch // 4 if options.restore_refresh is None else options.restore_refresh
        how = RestoreOptions(options.restored_per_batch, refresh, options.restore_steps, options.restore_levels)
        restoration = Restoration(store, how, options.seed, accelerator.process_index, accelerator.num_processes)
    if restoration or options.consistency_teacher == "ema":
        average = Average(model, options.ema_decay)
        accelerator.register_for_checkpointing(average)
    # What a checkpoint must agree in: a resume under another of these would not continue the same run.
    run = {
        "finetune": options.finetune,
        "store": store.hash,
        "seed": options.seed,
        "samples_per_step": samples_per_step,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        **{n: getattr(options, n) for n in ("low_noise", "consistency_teacher", "consistency_every", "consistency_start")},
        **asdict(objective),
        **(asdict(restoration.options) if restoration else {}),
        **({n: getattr(options, n) for n in ("restore_start", "restore_teacher")} if restoration else {}),
        **({"ema_decay": options.ema_decay} if average else {}),
    }
    skipped = Skipped(options.max_skipped_steps)
    progress = {"step": 0, "run": run, "heldout": [], "best": None, "skipped": skipped.state_dict()}
    if options.resume_from_checkpoint:
        found = find_checkpoint(output, options.resume_from_checkpoint, accelerator.print)
        if found is None:
            accelerator.print(f"No checkpoint in {output}: starting from the beginning.")
        else:
            progress = check_checkpoint(found)["progress"]
            if changed := differences(progress["run"], run):
                raise CheckpointError(f"{found} is of another run: {'; '.join(changed)}")
            accelerator.load_state(str(found))
            skipped.load_state_dict(progress.get("skipped", skipped.state_dict()))
            if restoration:
                restoration.load(found)
            accelerator.print(f"Resuming from {found}.")
    if accelerator.is_main_process:
        record = {k: v for k, v in asdict(options).items() if k != "noise_key_file"}
        write_json(output / "options.json", {"options": record, "environment": environment()})
    if options.report_to != "none":
        accelerator.init_trackers("sdxl_ambient", config=options.scalars())

    # -- loop ---------------------------------------------------------------------------------------------------------

    def info(step: int) -> dict:
        return {
            "t_n": common_t_n(store),
            "low_noise": options.low_noise,
            "loss_space": options.loss_space,
            "finetune": options.finetune,
            "base_model": Path(base).name if Path(base).is_dir() else base,
            "data": store.hash,
            "images": len(store),
            "prediction_type": schedule.prediction_type,
            "resolution": store.manifest["fingerprint"]["latent"]["resolution"],
            "step": step,
        }

    def on_device(batch):
        return batch.conditioning.to(accelerator.device, dtype)

    def export(folder: Path, step: int) -> Path:
        return (save_lora if lora else save_unet)(model, folder, info(step))

    first = progress["step"]
    accelerator.print(
        f"Training {sum(p.numel() for p in parameters):,} weights ({options.finetune}) on {len(store)} images at "
        f"t_n = {common_t_n(store)}: steps {first} to {max_train_steps}, {samples_per_step} samples each."
    )
    accumulation = options.gradient_accumulation_steps
    stream = Stream(
        len(store),
        options.train_batch_size,
        options.seed,
        start=first * accumulation,
        stop=max(first, max_train_steps) * accumulation,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    more = restoration.batches(stream.start, stream.stop, options.dataloader_num_workers) if restoration else None
    bar = tqdm(
        total=max_train_steps, initial=first, desc="steps", unit="step", disable=not accelerator.is_local_main_process
    )

    def save(step: int) -> None:
        progress.update(step=step, skipped=skipped.state_dict())
        own = restoration.save if restoration else None
        save_checkpoint(accelerator, output, step, progress, options.checkpoints_total_limit, own, info(step))

    step, summed, seen = first, {}, []
    rescue = stack.enter_context(Rescue(accelerator, save, first))
    for batch in loader(store, stream, options.dataloader_num_workers):
        with accelerator.accumulate(unet):
            generators, restored = batch.generators(options.seed), None
            extra = next(more) if restoration else None
            if restoration and step >= options.restore_start:
                drawn = restoration.generators(extra)
                restored = restoration.restored(extra, Denoiser(average, on_device(extra), dtype), schedule, drawn)
                batch = batch.first(0) if options.restore_levels == "all" else batch
                generators = [*generators[: len(batch.x_n)], *drawn]
                batch.conditioning = batch.conditioning.followed_by(extra.conditioning)
            denoise = Denoiser(unet, on_device(batch), dtype)
            teacher = Denoiser(average, denoise.conditioning, dtype) if options.consistency_teacher == "ema" else None
            due = step >= options.consistency_start and step % options.consistency_every == 0
            asked = objective if due else replace(objective, consistency_weight=0.0)
            x_n = batch.x_n.to(accelerator.device)
            losses = ambient_objective(denoise, schedule, x_n, batch.t_n, generators, asked, restored, teacher)
            seen += [(batch.contents, losses.ambient), (extra.contents if restored is not None else [], losses.restored)]
            accelerator.backward(losses.total)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(parameters, options.max_grad_norm or math.inf)
                # In float16 the gradient scaler leaves such steps out by itself, and lowers its scale.
                finite = norm is None or accelerator.scaler is not None or math.isfinite(norm)
                if not finite and skipped.note(gather_object(not_finite(seen))):
                    raise TrainingError(f"{skipped}, {skipped.in_a_row} of them in a row; lower --learning_rate")
                rescue.whole = not finite
            if not accelerator.sync_gradients or finite:
                optimizer.step()
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                lr_scheduler.step()
                # Never updated, the average is the weights that training started from.
                if finite and average and options.restore_teacher == "ema":
                    average.update()
            optimizer.zero_grad()
        stop = torch.tensor(float(interruption.reason is not None), device=accelerator.device)
        for name, value in accelerator.gather({**losses.means(), "stop": stop}).items():
            summed[name] = summed.get(name, 0.0) + float(value.mean()) / accumulation
        if not accelerator.sync_gradients:
            continue
        step, logged, summed, seen = step + 1, summed, {}, []
        told_to_stop = logged.pop("stop") > 0
        if finite:
            skipped.passed()
        else:
            accelerator.print(f"\nstep {step}: left out; so far {skipped}")
        rescue.finished(step)
        bar.update()
        bar.set_postfix({k: f"{v:.4f}" for k, v in logged.items()}, lr=f"{lr_scheduler.get_last_lr()[0]:.2e}")
        accelerator.log({**logged, "lr": lr_scheduler.get_last_lr()[0]}, step=step)

        if step % options.validation_steps == 0 or step == max_train_steps:
            validate(options, accelerator, model, schedule, heldout, objective, dtype, step, progress, export)
        if step % options.checkpointing_steps == 0 or step == max_train_steps or told_to_stop:
            rescue.save(step)
        if told_to_stop and step < max_train_steps:
            reason = interruption.reason or "another process, which was told to stop"
            accelerator.print(f"\nStopped by {reason} after step {step}; --resume_from_checkpoint latest goes on from here.")
            return
    bar.close()

    # -- save ---------------------------------------------------------------------------------------------------------

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        path = export(output, step)
        accelerator.print(f"Saved {path}")
        if progress["best"]:
            accelerator.print(
                f"Lowest held-out loss {progress['best'][1]:.4f} at step {progress['best'][0]}: {output / 'best'}"
            )


def validate(options, accelerator, model, schedule, heldout, objective, dtype, step, progress, export) -> None:
    """The held-out loss (the weights with the lowest are kept in ``best``) and images at fixed seeds."""
    output = Path(options.output_dir)
    if heldout is not None:
        loss = heldout_loss(
            accelerator, model, schedule, heldout, objective, batch_size=options.train_batch_size, dtype=dtype
        )
        accelerator.log({"heldout_loss": loss}, step=step)
        progress["heldout"].append([step, loss])
        accelerator.print(f"\nstep {step}: held-out loss {loss:.5f}")
        if progress["best"] is None or loss < progress["best"][1]:
            progress["best"] = [step, loss]
            if accelerator.is_main_process:
                export(output / "best", step)
        if accelerator.is_main_process:
            write_json(output / "heldout_loss.json", {"losses": progress["heldout"], "best": progress["best"]})
    if options.validation_prompt and accelerator.is_main_process:
        skip_below = options.t_n is not None and options.low_noise == "skip"
        auto = "hybrid" if skip_below else "full"
        drawn = validation_images(
            accelerator,
            model,
            options.pretrained_model_name_or_path,
            output / "validation" / f"step-{step:06d}",
            options.validation_prompt,
            count=options.num_validation_images,
            sampler=auto if options.validation_sampler == "auto" else options.validation_sampler,
            t_n=options.t_n,
            steps=options.validation_inference_steps,
            seed=options.seed,
            full_finetune=options.finetune == "full",
            vae=options.pretrained_vae_model_name_or_path,
            revision=options.revision,
            variant=options.variant,
        )
        track_images(accelerator, drawn, step)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    raise SystemExit(main())
