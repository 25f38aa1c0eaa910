"""The models to evaluate: which weights a name stands for, whether they are there, and their hashes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from sdxl_ambient.errors import CheckpointError, InterchangeError, OptionError, StageError, one_line
from sdxl_ambient.formats.files import check_files
from sdxl_ambient.formats.find import lora_file, unet_files
from sdxl_ambient.formats.merged import is_merged_only
from sdxl_ambient.formats.record import (
    DAMAGED_FILE,
    LORA_FILE,
    MODEL_FILE,
    STATE_FILE,
    lora_metadata,
    read_training_info,
    step_of,
)
from sdxl_ambient.pipeline import adapter_t_n
from sdxl_ambient.provenance import hash_file, hash_json, read_json
from sdxl_ambient.training.checkpoint import check_checkpoint as check_state
from sdxl_ambient.training.checkpoint import checkpoints


@dataclass(frozen=True)
class Checkpoint:
    """A model to evaluate: the base (neither path given), the base with a LoRA, or with a fully fine-tuned UNet.

    Attributes:
        name: what the report calls it.
        lora: a LoRA's file, or a folder with one.
        unet: a UNet's file or folder.
        run, step: the training run that it is a step of, and which.
    """

    name: str
    lora: Path | None = None
    unet: Path | None = None
    run: str | None = None
    step: int | None = None

    def t_n(self) -> int | None:
        """The noise level it was trained at; None for clean, the base model, or unknown."""
        path = self.lora or self.unet
        return adapter_t_n(path) if path else None


def check_model_path(name: str, value: str | None) -> None:
    """A path that looks local must be a pipeline's directory or a single file; anything else is taken for a Hub id.

    Raises:
        OptionError: it isn't. What a file holds is looked at when the model is checked.
    """
    if value is None or Path(value).is_file():
        return
    local = Path(value).exists() or value.startswith(("/", ".", "~")) or value.count("/") != 1
    if local and not (Path(value) / "model_index.json").is_file():
        allowed = "a diffusers pipeline's directory, a whole model's .safetensors file or a Hub id"
        raise OptionError(f"--{name}: {value!r} has no model_index.json; give {allowed}")


def check_checkpoint(option_name: str, path: Path) -> None:
    """The weights must be there, readable, of the right kind, and of known strength. Raises OptionError.

    All must be finite too; whether they fit the model shows when they are loaded.
    """
    if problem := _problem(option_name, path):
        raise OptionError(f"--{option_name}: {problem}")


def _problem(kind: str, path: Path) -> str | None:
    try:
        files = [p for p in weight_files(path, kind) if p.suffix == ".safetensors"]
    except InterchangeError as error:
        return str(error)
    return next(filter(None, (_file_problem(kind, file) for file in files)), None)


def _file_problem(kind: str, file: Path) -> str | None:
    try:
        with safe_open(str(file), "pt") as opened:
            names = list(opened.keys())
            is_lora = any("lora" in name.lower() for name in names) or is_merged_only(names)
        if kind == "lora" and is_lora:
            lora_metadata(file)
        if is_lora == (kind == "lora"):
            check_files([file])
    except (CheckpointError, InterchangeError) as error:
        return str(error)
    except DAMAGED_FILE as error:
        return f"{str(file)!r} can't be read; it is damaged, or no safetensors file ({one_line(error)})"
    if is_lora != (kind == "lora"):
        return f"{str(file)!r} " + ("is a LoRA; give it with --lora" if is_lora else "holds no LoRA; --unet takes a UNet")
    return None


def run_checkpoints(
    name: str,
    folder: Path,
    kind: str | None = None,
    warn: Callable[[str], None] = print,
    option_name: str = "run",
) -> list[Checkpoint]:
    """Every step of a training run that was kept, in order: its ``checkpoint-<step>`` folders and its final weights.

    Runs of this project's script and of the diffusers examples. Damaged states, and those whose weights can't be evaluated,
    are left out with a word through ``warn``. Each is called NAME-STEP; the final weights take the place of a state of the
    same step, and are left out where the step isn't recorded.

    Args:
        kind: "lora" or "unet"; by default what each folder holds.

    Raises:
        OptionError: no such folder, or nothing in it to evaluate.
    """
    if not folder.is_dir():
        raise OptionError(f"--{option_name}: {str(folder)!r} is not a folder")
    places = {step: [state] for state in checkpoints(folder) if (step := step_of(state)) is not None}
    try:
        last = read_training_info(folder).get("step")
    except CheckpointError as error:
        warn(f"left out: {error}")
        last = None
    if isinstance(last, int) and _weights_in(folder, kind):
        places[last] = [folder, *places.get(last, [])]
    kept = []
    for step in sorted(places):
        weights = next(filter(None, (_whole_weights(place, kind, warn) for place in places[step])), None)
        if weights:
            kept.append(Checkpoint(f"{name}-{step}", weights.get("lora"), weights.get("unet"), run=name, step=step))
    if not kept:
        what = {"lora": "with a LoRA", "unet": "with a UNet"}.get(kind or "", "of a training run")
        raise OptionError(f"--{option_name}: {str(folder)!r} holds no whole checkpoint-<step> {what}")
    return kept


def _whole_weights(place: Path, kind: str | None, warn: Callable[[str], None]) -> dict[str, Path]:
    """``{"lora": path}`` or ``{"unet": path}`` of one step; {} with a word through ``warn`` where they can't be used."""
    weights = _weights_in(place, kind)
    problem = next((_problem(k, path) for k, path in weights.items()), f"{place} holds no weights to evaluate")
    try:
        # Only our own states say what they should hold; of others, a file cut short shows in its header.
        if (place / STATE_FILE).is_file():
            check_state(place)
    except CheckpointError as error:
        problem = str(error)
    if problem:
        warn(f"left out: {problem}")
    return {} if problem else weights


def _weights_in(place: Path, kind: str | None) -> dict[str, Path]:
    named = {"lora": place / LORA_FILE, "unet": place / "unet"}
    if not named["unet"].is_dir():
        named["unet"] = place / MODEL_FILE
    return next(({k: path} for k, path in named.items() if kind in (None, k) and path.exists()), {})


def check_tuned(lora: str | None, unet: str | None) -> None:
    """The LoRA or the UNet of a stage that takes one model: not both, and with their weights. Raises OptionError."""
    if lora and unet:
        raise OptionError("--unet: can not be combined with --lora")
    for name, path in (("lora", lora), ("unet", unet)):
        if path:
            check_checkpoint(name, Path(path))


def tuned(lora: str | None, unet: str | None, output_dir: str) -> Checkpoint:
    """The one model of such a stage, called like its output folder."""
    return Checkpoint(Path(output_dir).name, Path(lora) if lora else None, Path(unet) if unet else None)


def resolve_base(
    name_or_path: str, revision: str | None = None, variant: str | None = None, prediction_type: str | None = None
) -> Path:
    """The base model's folder or single file, downloaded from the Hub (or found in its cache) where it is neither."""
    # Here for start-up time: options are parsed before torch and diffusers are imported.
    from diffusers import DiffusionPipeline

    from sdxl_ambient.models.base import check_sdxl

    check_sdxl(name_or_path, revision, prediction_type=prediction_type)
    if Path(name_or_path).exists():
        return Path(name_or_path)

    try:
        folder = DiffusionPipeline.download(name_or_path, revision=revision, variant=variant, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise StageError(f"--pretrained_model_name_or_path: {name_or_path!r} can't be fetched: {reason}") from None
    return Path(folder)


def weight_files(path: Path, kind: str) -> list[Path]:
    """The files that decide what a checkpoint draws.

    Args:
        kind: "lora", "unet" (a file, a folder, one that holds ``unet/``, or a training state), "base" or "vae".

    Raises:
        InterchangeError: no LoRA or UNet there, or several LoRAs.
    """
    if kind == "lora":
        return [lora_file(path)]
    if kind == "unet":
        return [file for file in unet_files(path) if not file.name.endswith(".index.json")]
    if path.is_file():
        return [path] if path.suffix == ".safetensors" else []
    index = path / "model_index.json"
    components = [name for name in read_json(index) if (path / name).is_dir()] if index.is_file() else ["."]
    files = [p for name in components for p in (path / name).iterdir() if p.is_file() and not p.name.startswith(".")]
    return sorted([*files, index] if index.is_file() else files)


@functools.cache
def hash_weights(path: Path, kind: str) -> str:
    """SHA-256 over the names and contents of :func:`weight_files`."""
    root = path.parent if path.is_file() else path
    return hash_json({p.relative_to(root).as_posix(): hash_file(p) for p in weight_files(path, kind)})
