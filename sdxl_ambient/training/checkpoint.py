"""Save, rotate, find and check training states. Every file is written whole or not at all."""

from __future__ import annotations

import hashlib
import hmac
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdxl_ambient.errors import CheckpointError, OptionError, one_line
from sdxl_ambient.formats.peft import add_info, load_lora_state, lora_parts, replace_folder, write_lora
from sdxl_ambient.formats.record import INFO_FILE, LORA_FILE, STATE_FILE, public_info, step_of
from sdxl_ambient.home import signing_key
from sdxl_ambient.provenance import hash_file, hash_json, read_json, read_sealed, write_json, write_sealed
from sdxl_ambient.training.distributed import is_sharded
from sdxl_ambient.training.state import save_state

FORMAT_VERSION = 2
THREADS = min(8, os.cpu_count() or 1)  # that check files

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

    All processes call it. Everything goes into a temporary folder (:mod:`sdxl_ambient.training.state`); the list of its
    files with their SHA-256 is written last and the folder renamed, so that a checkpoint that was cut short is never taken
    for whole, and nothing older is removed before it stands.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    temporary = Path(output_dir) / f".checkpoint-{step}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    save_state(accelerator, temporary)
    if save_more is not None:
        save_more(temporary)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if info is not None:
            _record(temporary, info)
        content = {"format_version": FORMAT_VERSION, "step": step, "progress": progress, "files": hashes_of(temporary)}
        if is_sharded(accelerator):
            content["signature"] = signature(content)
        write_sealed(temporary / STATE_FILE, content)
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


def hashes_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below a folder, by its path there."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(lambda name: hash_file(folder / name), names)
        return {n: {"size": (folder / n).stat().st_size, "sha256": h} for n, h in zip(names, digests, strict=True)}


def signature(content: Mapping[str, Any]) -> str:
    """What only this user can write under a checkpoint's list of files: HMAC-SHA-256 with a key in the user's own folder."""
    signed = {name: value for name, value in content.items() if name != "signature"}
    return hmac.new(signing_key(), hash_json(signed).encode(), hashlib.sha256).hexdigest()


def check_checkpoint(folder: str | Path) -> dict:
    """The state record of a whole checkpoint: ``step``, ``progress``, ``files``. Every bit of its files is checked.

    Raises:
        CheckpointError: no such checkpoint, one of an earlier format, or a file is missing or not as it was written.
    """
    folder = Path(folder)
    state = recorded(folder)
    sizes = {name: (folder / name).stat().st_size if (folder / name).is_file() else None for name in state["files"]}
    for name, wanted in state["files"].items():
        if sizes[name] is None:
            raise CheckpointError(f"{folder} is damaged: {name} is missing")
        if sizes[name] != wanted["size"]:
            raise CheckpointError(f"{folder} is damaged: {name} has {sizes[name]} bytes, {wanted['size']} were written")
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(lambda name: hash_file(folder / name), state["files"])
        shown = tqdm(digests, f"checking {folder.name}", len(sizes), unit="file", delay=2, disable=None)
        for (name, wanted), digest in zip(state["files"].items(), shown, strict=True):
            if digest != wanted["sha256"]:
                raise CheckpointError(f"{folder} is damaged: {name} is not as it was written")
    return state


def recorded(folder: Path) -> dict:
    """The state record alone, its files unchecked. Raises CheckpointError."""
    path = folder / STATE_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {STATE_FILE}")
    try:
        state = read_json(path)
        if isinstance(state, dict) and "files" in state and state.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{folder} is of an earlier format, whose states can run code; go on with the version that wrote it, or "
                "begin again in another folder"
            )
        state = read_sealed(path)
        if type(state["step"]) is not int or not isinstance(state["progress"], dict):
            raise ValueError("it has no step or progress")
        for name, one in state["files"].items():
            if Path(name).is_absolute() or ".." in Path(name).parts or not isinstance(one["sha256"], str):
                raise ValueError(f"{name!r} is no file of a checkpoint")
            one["size"]
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{folder} is damaged: {STATE_FILE} lacks {error}") from None
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{folder} is damaged: {one_line(error)}") from None
    return state


def check_trusted(folder: str | Path, trusted: bool) -> None:
    """Whether a checkpoint of weights that are spread over processes may be read: its libraries' pickles can run code.

    Raises:
        CheckpointError: it isn't this user's, or has files that nobody signed, and it isn't ``trusted``.
    """
    folder = Path(folder)
    if trusted:
        return
    state = recorded(folder)
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {STATE_FILE}
    signed = hmac.compare_digest(str(state.get("signature")), signature(state))
    if not signed or there != state["files"].keys():
        what = "has files that nobody signed" if signed else "was not written by you on this machine"
        raise CheckpointError(
            f"{folder} {what}, and reading its sharded states can run code; give --trust_checkpoint if you trust who wrote "
            "them"
        )


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
