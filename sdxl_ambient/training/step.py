"""One optimizer step: losses, clipping, steps that are left out, what is logged, and the rescue of the last whole step."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from sdxl_ambient.errors import TrainingError
from sdxl_ambient.models.denoiser import Denoiser
from sdxl_ambient.objective import Losses, ObjectiveOptions, ambient_objective
from sdxl_ambient.store.batches import Batch
from sdxl_ambient.training.distributed import as_number
from sdxl_ambient.training.interruption import Interruption, Rescue, not_finite, overflowed
from sdxl_ambient.training.progress import ProgressMeter
from sdxl_ambient.training.run import Run


class TrainingStep:
    """Takes a run's optimizer steps, each of one or more micro-steps, and counts them.

    For each micro-step the loop calls :meth:`losses`, the backward pass and :meth:`update`; at the end of an optimizer step
    :meth:`finished` too. As a context it measures the losses before the first step, and saves the last whole step where
    something fails.

    Args:
        first: optimizer steps that are done already.

    Attributes:
        step: optimizer steps that are done. interrupted: whether the run was told to stop before its end.
    """

    def __init__(self, run: Run, first: int, interruption: Interruption):
        self.run, self.step, self.interruption, self.interrupted = run, first, interruption, False
        self.fused = run.settings.fused_backward_pass  # it changes the weights in the backward pass
        self.parameters = [p for group in run.optimizer.param_groups for p in group["params"]]  # sharding replaced them
        self.finite = True
        self.context = ExitStack()
        self._start_step()

    def _start_step(self) -> None:
        """Nothing of the next optimizer step is done yet."""
        self.scalars: dict[str, float] = {}
        self.seen: list[tuple[list[str], torch.Tensor | None]] = []
        self.total: torch.Tensor | float = 0.0

    def __enter__(self) -> TrainingStep:
        run = self.run
        with run.evaluating():
            run.validation.begin(run.model.wrapped[0])
        steps, device = run.max_train_steps, run.accelerator.device
        self.meter = ProgressMeter(run.samples_per_step, steps, self.step, device=device)
        local = run.accelerator.is_local_main_process
        self.bar = tqdm(total=steps, initial=self.step, desc="steps", unit="step", disable=not local)
        self.context.enter_context(self.bar)
        self.rescue = self.context.enter_context(Rescue(run.accelerator, run.save, self.step, common=TrainingError))
        return self

    def __exit__(self, *error) -> bool | None:
        return self.context.__exit__(*error)

    # -- a micro-step ----------------------------------------------------------------------

    def losses(self, batch: Batch, extra: Batch | None) -> Losses:
        """The losses of a batch, and of the rows that ``extra`` adds to it or that take its place.

        Raises:
            FloatingPointError: a loss that isn't finite, where the backward pass would change the weights at once.
        """
        run, settings = self.run, self.run.settings
        device = run.accelerator.device
        denoise, generators = run.model.denoiser(batch, device), batch.generators(settings.seed)
        more = run.extra.rows(extra, self.step) if run.extra and extra is not None else None
        if more is not None:
            batch = batch.first(0) if more.replace else batch
            generators = [*generators[: len(batch.x_n)], *more.generators]
            denoise = denoise.rows(slice(len(batch.x_n))).followed_by(more.conditioning)
        teacher = None
        if settings.consistency_teacher == "ema":
            assert run.average is not None
            teacher = Denoiser(run.average, denoise.conditioning, denoise.dtype)
        rows, contents = (more.rows, more.contents) if more is not None else (None, [])
        x_n = batch.x_n.to(device)
        losses = ambient_objective(denoise, run.data.schedule, x_n, batch.t_n, generators, self._objective(), rows, teacher)
        self.seen += [(batch.contents, losses.ambient), (contents, losses.extra)]
        self.total = self.total + losses.total.detach()
        if self.fused and not math.isfinite(self.total):
            raise FloatingPointError(f"step {self.step + 1}: the loss is {float(losses.total)}; lower --learning_rate")
        self.rescue.whole = not self.fused
        return losses

    def _objective(self) -> ObjectiveOptions:
        """Without the consistency loss in steps where it isn't due."""
        settings, objective = self.run.settings, self.run.objective
        due = self.step >= settings.consistency_start and self.step % settings.consistency_every == 0
        return objective if due else replace(objective, consistency_weight=0.0)

    def update(self, losses: Losses) -> None:
        """After the backward pass: clip, and take the optimizer's step where gradients are whole and finite.

        Raises:
            TrainingError: too many steps in a row were left out.
        """
        run, accelerator = self.run, self.run.accelerator
        if accelerator.sync_gradients:
            self.finite = self._gradients_are_finite()
            self.rescue.whole = not self.finite and not self.fused
        # A gradient scaler must see every step; it leaves those out by itself.
        if not accelerator.sync_gradients or self.finite or accelerator.scaler is not None:
            run.optimizer.step()
        if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
            run.lr_scheduler.step()
            if self.finite and run.average is not None:
                run.average.update()
        run.optimizer.zero_grad()
        self._add_scalars(losses)

    def _gradients_are_finite(self) -> bool:
        """Clip the gradients. Whether they are finite, in all processes, or the gradient scaler's affair."""
        accelerator, settings = self.run.accelerator, self.run.settings
        if self.fused:
            return True
        norm = as_number(accelerator.clip_grad_norm_(self.parameters, settings.max_grad_norm or math.inf))
        if norm is None or math.isfinite(norm):
            return True
        images, broken = gather_object(not_finite(self.seen)), gather_object([not math.isfinite(self.total)])
        if overflowed(accelerator.scaler, any(broken)):
            return True
        skipped = self.run.skipped
        if skipped.note(images):
            raise TrainingError(f"{skipped}, {skipped.in_a_row} of them in a row; lower --learning_rate")
        return False

    def _add_scalars(self, losses: Losses) -> None:
        """Means over processes, and over the micro-steps of an optimizer step; and whether any process should stop."""
        accelerator = self.run.accelerator
        stop = torch.tensor(float(self.interruption.reason is not None), device=accelerator.device)
        share = self.run.settings.gradient_accumulation_steps
        for name, value in accelerator.gather({**losses.means(), "stop": stop}).items():
            self.scalars[name] = self.scalars.get(name, 0.0) + float(value.mean()) / share

    # -- the end of an optimizer step ----------------------------------------------------------------------

    def finished(self) -> bool:
        """One more optimizer step is done: log, validate and save what is due. Returns whether to stop."""
        run, scalars = self.run, self.scalars
        self.step += 1
        self._start_step()
        told_to_stop = scalars.pop("stop") > 0
        if self.finite:
            run.skipped.passed()
        else:
            run.accelerator.print(f"\nstep {self.step}: left out; so far {run.skipped}")
        if run.extra:
            run.extra.commit()
        self.rescue.finished(self.step)
        self._log(scalars)
        last = self.step == run.max_train_steps
        enough = self._validate_and_save(last, told_to_stop)
        if enough:
            run.accelerator.print(f"\nStopped after step {self.step}: {enough}.")
        elif told_to_stop and not last:
            self.interrupted = True
            reason = self.interruption.reason or "another process, which was told to stop"
            run.accelerator.print(
                f"\nStopped by {reason} after step {self.step}; --resume_from_checkpoint latest goes on from here."
            )
        return bool(enough) or self.interrupted

    def _log(self, scalars: dict[str, float]) -> None:
        self.meter.step()
        self.bar.update()
        rate = self.run.lr_scheduler.get_last_lr()[0]
        shown = {name: f"{value:.4f}" for name, value in scalars.items()}
        self.bar.set_postfix({**shown, "lr": f"{rate:.2e}", **self.meter.postfix()})
        self.run.accelerator.log({**scalars, "lr": rate, **self.meter.scalars()}, step=self.step)

    def _validate_and_save(self, last: bool, told_to_stop: bool) -> str | None:
        """Why there has been enough training, if there has."""
        run, enough = self.run, None
        with self.meter.pause():
            if run.validation.due(self.step, last):
                with run.evaluating():
                    enough = run.validation.run(run.model.wrapped[0], self.step, last, run.export)
            if self.step % run.settings.checkpointing_steps == 0 or last or told_to_stop or enough:
                self.rescue.save(self.step)
        return enough
