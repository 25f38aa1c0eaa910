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
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_ambient.config.parser import parse_options
from sdxl_ambient.config.training import TrainOptions
from sdxl_ambient.errors import run_command

# Everything else is imported after the options are checked, since it takes seconds.
if TYPE_CHECKING:
    from accelerate import Accelerator

    from eval.quick import QuickLook
    from sdxl_ambient.training.interruption import Interruption
    from sdxl_ambient.training.run import Run

PROG = "train_sdxl_ambient.py"


def main(argv: list[str] | None = None) -> int:
    options = parse_options(TrainOptions, argv, prog=PROG, description=__doc__)

    from sdxl_ambient.training.interruption import Interrupted, Interruption

    accelerator = open_accelerator(options)
    interruption = Interruption(options.time_limit)

    def run() -> int:
        try:
            with interruption, ExitStack() as stack:
                train(options, accelerator, interruption, stack)
        except Interrupted as reason:
            accelerator.print(
                f"\nStopped by {reason} before the first step. What is encoded stays; the same command goes on."
            )
        return interruption.exit_code

    try:
        return run_command(PROG, run, also=(FloatingPointError,), quiet=not accelerator.is_main_process)
    finally:
        accelerator.end_training()


def open_accelerator(options: TrainOptions) -> Accelerator:
    """Accelerate's view of the processes, and the log's format."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

    logs = str(Path(options.output_dir) / options.logging_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        mixed_precision=options.mixed_precision,
        log_with=None if options.report_to == "none" else options.report_to,
        project_config=ProjectConfiguration(project_dir=options.output_dir, logging_dir=logs),
        # Encoding and validation may keep one process waiting for longer than the usual ten minutes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(hours=6))],
    )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    for noisy in ("httpx", "accelerate.checkpointing", "accelerate.accelerator"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return accelerator


def train(options: TrainOptions, accelerator: Accelerator, interruption: Interruption, stack: ExitStack) -> None:
    """Set up, resume, loop, save."""
    from sdxl_ambient.devices import locked_by_main
    from sdxl_ambient.hub.upload import check_hub, repository
    from sdxl_ambient.training.dry_run import dry_run
    from sdxl_ambient.training.resume import resume
    from sdxl_ambient.training.settings import dry_run_settings
    from sdxl_ambient.training.setup import (
        announce,
        build_lr_scheduler,
        build_model,
        build_optimizer,
        open_data,
        prepare_process,
        set_up,
    )
    from sdxl_ambient.training.step import TrainingStep

    # -- set up -------------------------------------------------------------------------------------------------------

    if not options.dry_run:
        stack.enter_context(locked_by_main(options.output_dir, accelerator.print, accelerator))
    prepare_process(options, accelerator)
    hub = repository(options.hub_model_id, options.output_dir) if options.push_to_hub else None
    if hub and accelerator.is_main_process:
        hub = check_hub(hub, options.hub_private)
    look = quick_look(options, accelerator, stack)  # before the rest, since it may refuse

    data = open_data(options, accelerator, interruption)
    model = build_model(options, accelerator, data)
    optimizer = build_optimizer(options, accelerator, model)
    lr_scheduler = build_lr_scheduler(options, accelerator, data, optimizer)
    *model.prepared, optimizer = accelerator.prepare(*model.modules, optimizer)
    run = set_up(options, accelerator, data, model, optimizer, lr_scheduler, look)

    # -- resume -------------------------------------------------------------------------------------------------------

    first = resume(run, options.resume_from_checkpoint, options.trust_checkpoint)
    announce(options, run, first)
    if options.dry_run:
        dry_run(run, first, dry_run_settings(options))
        return

    # -- loop ---------------------------------------------------------------------------------------------------------

    with TrainingStep(run, first, interruption) as step:
        for batch, extra in run.batches(first):
            with accelerator.accumulate(*model.wrapped):
                losses = step.losses(batch, extra)
                accelerator.backward(losses.total)
                step.update(losses)
            if accelerator.sync_gradients and step.finished():
                break

    # -- save ---------------------------------------------------------------------------------------------------------

    if not step.interrupted:
        finish(options, run, step.step, hub)


def finish(options: TrainOptions, run: Run, step: int, hub: str | None) -> None:
    """Export the weights, and upload them where that is asked for."""
    from sdxl_ambient.hub.upload import push

    accelerator = run.accelerator
    accelerator.wait_for_everyone()
    with run.evaluating():
        run.export(run.output, step)
    accelerator.print(f"Saved {run.output}")
    if run.validation.best:
        at, loss = run.validation.best
        accelerator.print(f"Lowest held-out loss {loss:.4f} at step {at}: {run.output / 'best'}")
    if hub and accelerator.is_main_process:
        push(
            run.output,
            repo_id=hub,
            private=options.hub_private,
            license=options.hub_license,
            report=options.memorization_report,
            log=accelerator.print,
        )


def quick_look(options: TrainOptions, accelerator: Accelerator, stack: ExitStack) -> QuickLook | None:
    """The evaluation's fast path, where it is asked for; what it computes of the clean images stays in memory."""
    if options.memorization_every is None or not accelerator.is_main_process:
        return None
    from eval.quick import QuickLook
    from sdxl_ambient.images.captions import Columns

    folder = stack.enter_context(tempfile.TemporaryDirectory())
    train, heldout = options.train_data_dir, options.heldout_data_dir
    assert train is not None and heldout is not None  # validated with --memorization_every
    columns = Columns(options.caption_column, encoding=options.caption_encoding)
    look = QuickLook(train, heldout, folder, options.memorization_embedder, columns=columns)
    look.prepare()
    return look


if __name__ == "__main__":
    raise SystemExit(main())
