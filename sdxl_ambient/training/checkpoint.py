"""Save, rotate, find and check training states. Every file is written whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from sdxl_ambient.errors import CheckpointError, OptionError
from sdxl_ambient.formats.peft import add_info, load_lora_state, lora_parts, replace_folder, write_lora
from sdxl_ambient.formats.record import INFO_FILE, LORA_FILE, STATE_FILE, public_info, step_of
from sdxl_ambient.provenance import read_json, write_json

# -- training states ----------------------------------------------------------------------


def register_lora_hooks(accelerator, unet, text_encoders: Sequence | None = None) -> None:
    """Make ``accelerator.save_state`` store the LoRA alone, instead of whole models, and ``load_state`` read it back.

    The models are out of their wrappers, and whole: where FSDP or DeepSpeed shards them, accelerate stores them its own way.
    All parts are in one file, the one that users load.
    """
    parts = lora_parts(unet, text_encoders)

    def save(models, weights, folder):
        weights.clear()
        if accelerator.is_main_process:
            write_lora(parts, Path(folder) / LORA_FILE)

    def load(models, folder):
        models.clear()
        load_lora_state(unet, Path(folder) / LORA_FILE, text_encoders)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(
    accelerator,
    output_dir: str | Path,
    step: int,
    progress: dict,
    limit: int | None = None,
    save_more: Callable[[Path], None] | None = None,
    info: dict | None = None,
) -> Path:
    """Write ``checkpoint-<step>`` with everything a resume needs, then remove the oldest beyond ``limit``.

    ``save_more(folder)`` is called by every process, for state that each has of its own. ``info`` (t_n, objective, …) is
    stored as the final weights' is, so that a training state can be evaluated like them.

    All processes call it. Model, optimizer, scheduler and random states go through ``accelerator.save_state`` into a
    temporary folder; its list of files and sizes is written last and the folder renamed, so that a checkpoint that was cut
    short is never taken for whole, and nothing older is removed before it stands.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    temporary = Path(output_dir) / f".checkpoint-{step}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    if save_more is not None:
        save_more(temporary)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if info is not None:
            _record(temporary, info)
        files = {p.relative_to(temporary).as_posix(): p.stat().st_size for p in temporary.rglob("*") if p.is_file()}
        write_json(temporary / STATE_FILE, {"step": step, "progress": progress, "files": dict(sorted(files.items()))})
        replace_folder(temporary, final)
        for old in checkpoints(output_dir)[: -limit or None] if limit else []:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def _record(folder: Path, info: dict) -> None:
    if (folder / LORA_FILE).is_file():
        add_info(folder / LORA_FILE, info)
    write_json(folder / INFO_FILE, public_info(info))


def checkpoints(output_dir: str | Path) -> list[Path]:
    """All ``checkpoint-<step>`` folders, the earliest step first."""
    folders = ((step_of(path), path) for path in Path(output_dir).glob("checkpoint-*") if path.is_dir())
    return [path for _, path in sorted((step, path) for step, path in folders if step is not None)]


def check_checkpoint(folder: str | Path) -> dict:
    """The state record of a whole checkpoint: ``step``, ``progress``, ``files``.

    Raises:
        CheckpointError: no such checkpoint, or a file is missing or of another size than was written.
    """
    folder = Path(folder)
    if not (folder / STATE_FILE).is_file():
        raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {STATE_FILE}")
    try:
        state = read_json(folder / STATE_FILE)
    except ValueError as error:
        raise CheckpointError(f"{folder} is damaged: {error}") from None
    for name, size in state["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} is damaged: {name} is missing")
        if path.stat().st_size != size:
            raise CheckpointError(f"{folder} is damaged: {name} has {path.stat().st_size} bytes, {size} were written")
    return state


def find_checkpoint(output_dir: str | Path, resume_from: str, warn=print) -> Path | None:
    """``latest`` → the last whole checkpoint (damaged ones are reported and passed over) or None; else the one named.

    Raises:
        CheckpointError: a checkpoint given by name that is missing or damaged, or ``latest`` with only damaged ones.
    """
    if resume_from != "latest":
        path = Path(resume_from) if Path(resume_from).is_dir() else Path(output_dir) / resume_from
        check_checkpoint(path)
        return path
    problems = []
    for path in reversed(checkpoints(output_dir)):
        try:
            check_checkpoint(path)
            return path
        except CheckpointError as error:
            problems.append(str(error))
            warn(f"passed over: {error}")
    if problems:
        raise CheckpointError(f"no whole checkpoint in {output_dir}: {problems[0]}")
    return None


def refuse_to_overwrite(output_dir: str | Path, resume_from: str | None) -> None:
    """Raises OptionError where a folder holds a run's results and nothing says to go on with it."""
    output = Path(output_dir)
    made = [*checkpoints(output), *(p for p in (output / LORA_FILE, output / "unet") if p.exists())]
    if made and not resume_from:
        raise OptionError(
            f"--output_dir: {str(output)!r} holds an earlier run ({made[-1].name}); go on with "
            "--resume_from_checkpoint latest, or give another folder"
        )
