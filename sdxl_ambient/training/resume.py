"""Where a run starts: at its beginning, or at a checkpoint that agrees with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from accelerate import Accelerator
from accelerate.utils import gather_object

from sdxl_ambient.errors import CheckpointError
from sdxl_ambient.provenance import differences
from sdxl_ambient.training.checkpoint import check_trusted, find_checkpoint, recorded
from sdxl_ambient.training.distributed import is_sharded
from sdxl_ambient.training.run import Run
from sdxl_ambient.training.state import load_state

T = TypeVar("T")


def resume(run: Run, resume_from: str | None, trust: bool = False) -> int:
    """Load the checkpoint to go on from, if there is one. Returns the optimizer steps that it has behind it, else 0.

    ``resume_from``: ``latest``, a checkpoint's folder or its name; None to start from the beginning. ``trust``: whether
    states that can run code are read from a checkpoint that somebody else wrote.

    Raises:
        CheckpointError: see :func:`find_start`.
    """
    accelerator = run.accelerator
    run.progress = {"step": 0}
    start = find_start(run.output, resume_from, run.record, accelerator, is_sharded(accelerator))
    if start is not None:
        folder, run.progress = start
        if is_sharded(accelerator):
            on_main(accelerator, lambda: check_trusted(folder, trust))
        load_state(accelerator, folder)
        # Accelerate counts micro-steps; a step that failed in the middle isn't counted.
        accelerator.step = run.progress["step"] * run.settings.gradient_accumulation_steps
        run.skipped.load_state_dict(run.progress["skipped"])
        run.validation.load_state_dict(run.progress)
        if run.extra:
            run.extra.load(folder)
        accelerator.print(f"Resuming from {folder}.")
        for line in changed_options(run.progress.get("applied", {}), run.applied):
            accelerator.print(line)
    run.progress.update(run=run.record, applied=run.applied, processes=accelerator.num_processes)
    return run.progress["step"]


def find_start(
    output: Path, resume_from: str | None, record: dict, accelerator: Accelerator, sharded: bool = False
) -> tuple[Path, dict] | None:
    """The checkpoint to go on from and its progress; None to start from the beginning.

    Another number of processes is fine while a step has the same samples: data, times and noise follow from the step alone.
    ``record``: what the checkpoint must agree in (:func:`sdxl_ambient.training.record.run_record`).

    Raises:
        CheckpointError: none that is whole, of another run, or one that this many processes can't go on from.
    """
    if not resume_from:
        return None
    folder = on_main(accelerator, lambda: find_checkpoint(output, resume_from, accelerator.print))
    if folder is None:
        accelerator.print(f"No checkpoint in {output}: starting from the beginning.")
        return None
    progress = recorded(folder)["progress"]
    # What an earlier version didn't record can't be compared.
    known = {name: value for name, value in record.items() if name in progress["run"]}
    if changed := differences(progress["run"], known):
        raise CheckpointError(f"{folder} is of another run: {'; '.join(changed)}")
    _check_processes(folder, progress, record, accelerator, sharded)
    return folder, progress


def changed_options(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each option that may change on resume, and did. What an earlier version didn't record is not compared."""
    changed = [name for name in now if name in before and before[name] != now[name]]
    return [f"note: --{name} is {now[name]} from here on; it was {before[name]}" for name in changed]


def on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """What ``function`` returns on the main process, on all; or its CheckpointError."""
    found: T | None = None
    failure: str | None = None
    if accelerator.is_main_process:
        try:
            found = function()
        except CheckpointError as error:
            failure = str(error)
    if accelerator.num_processes > 1:
        found, failure = gather_object([(found, failure)])[0]
    if failure is not None:
        raise CheckpointError(failure)
    return cast(T, found)


def _check_processes(folder: Path, progress: dict, record: dict, accelerator: Accelerator, sharded: bool) -> None:
    now = accelerator.num_processes
    before = progress.get("processes", now)
    if now == before:
        return
    if sharded:
        raise CheckpointError(
            f"{folder} was written by {before} processes, which share the weights; {now} can't go on from it. Start {before}"
        )
    what = ["the sums over a batch are in another order"]
    if record.get("lora_dropout"):  # a full fine-tune records none
        what.append("--lora_dropout draws anew")
    if record["low_noise"] == "restore":
        what.append("the processes restore other images")
    accelerator.print(
        f"note: {folder} was written by {before} processes and goes on with {now}: the same data, times and noise, but "
        f"{', '.join(what)}, so the result is not the same to the last bit"
    )
