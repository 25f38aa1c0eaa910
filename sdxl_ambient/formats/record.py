"""What is recorded with weights, in their file and beside it, and how it is read."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError, safe_open

from sdxl_ambient.errors import CheckpointError, JsonError, one_line
from sdxl_ambient.levels import MAXIMUM_T_N
from sdxl_ambient.provenance import parse_json, read_json

LORA_FILE = "pytorch_lora_weights.safetensors"
INFO_FILE = "training.json"
INFO_KEY = "sdxl_ambient"  # the same information inside an adapter's own file, under this metadata key
ARCHITECTURE = "stable-diffusion-xl-v1-base"  # as ModelSpec names SDXL; "/lora" is appended as kohya's scripts do
GENERATIVE_MODELS = "https://github.com/Stability-AI/generative-models"  # ModelSpec's name for the original release's names
STATE_FILE = "checkpoint.json"
# What the safetensors library raises for files that are damaged, or made to be.
DAMAGED_FILE = (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError)
MIXED = "mixed"  # t_n of training on images of several noise levels
_MOST_INFO = 1 << 24  # bytes; some hundred are usual
# Of what is recorded, the types of what is computed with; an earlier or later version may record more.
_INFO_TYPES = {"t_n": (int, str), "step": (int,), "prediction_type": (str,), "finetune": (str,), "low_noise": (str,)}
_WORDS = {int: "a whole number", str: "a text"}
MODEL_FILE = "model.safetensors"  # a fully fine-tuned UNet in a training state, as accelerate stores it


def public_info(info: dict) -> dict:
    """What may stand in a file that is shared: all but what is named after a key, since the noise's must never be."""
    return {name: value for name, value in info.items() if "key" not in name.lower()}


def model_metadata(info: dict, architecture: str, implementation: str, title: str | None = None) -> dict[str, str]:
    """A safetensors file's metadata: Stability's ModelSpec 1.0.0, and ``info`` whole and in its main points.

    No date unless ``info`` has one, so that the same weights are saved with the same words.

    Args:
        info: what training records; ``resolution`` (pixels, or width and height) and ``prediction_type`` are used if there.
        implementation: whose names the tensors have, such as "diffusers".
    """
    info = public_info(info)
    t_n, objective = info.get("t_n"), info.get("low_noise") if "t_n" in info else None
    size = info.get("resolution")
    size = [size, size] if isinstance(size, int) else size
    kind = info.get("prediction_type")
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": implementation,
        "modelspec.title": title or _title(info),
        "modelspec.date": info.get("date"),
        "modelspec.resolution": size and "x".join(map(str, size)),
        "modelspec.prediction_type": "v" if kind == "v_prediction" else kind,
        # Levels that were never trained: a loader that heeds this keeps them the base model's.
        "modelspec.timestep_range": f"{t_n + 1},999" if objective == "skip" and isinstance(t_n, int) else None,
        f"{INFO_KEY}.t_n": ("none" if t_n is None else t_n) if "t_n" in info else None,
        f"{INFO_KEY}.objective": objective and ("denoising" if t_n is None else f"ambient, {objective} at t <= t_n"),
        f"{INFO_KEY}.base_model": info.get("base_model"),
        f"{INFO_KEY}.data": info.get("data"),
        INFO_KEY: json.dumps(info, sort_keys=True),
    }
    return {name: str(value) for name, value in metadata.items() if value is not None}


def _title(info: dict) -> str:
    facts = [f"{name} {info[name]}" for name in ("t_n", "step") if info.get(name) is not None]
    return " ".join(["SDXL Ambient", info.get("finetune") or "LoRA", *([f"({', '.join(facts)})"] if facts else [])])


def read_training_info(path: str | Path) -> dict:
    """What training recorded about a LoRA or a UNet (folder or file), or a training state; {} where nothing is recorded.

    Raises:
        CheckpointError: a record that can't be read.
    """
    path = Path(path)
    if path.is_file():
        own = _own_info(path) if path.suffix == ".safetensors" else {}
        return own or (read_training_info(path.parent) if path.name in (LORA_FILE, MODEL_FILE) else {})
    if info := _info_file(path):
        return info
    if (path / LORA_FILE).is_file() and (info := _own_info(path / LORA_FILE)):
        return info
    if path.name == "unet":
        return read_training_info(path.parent)
    # A training state of an earlier version has no record of its own; the run's holds for it but for the step.
    if (step := step_of(path)) is not None and (info := _info_file(path.parent)):
        return {**info, "step": step}
    return {}


def _info_file(folder: Path) -> dict:
    path = folder / INFO_FILE
    try:
        return _checked_info(read_json(path, _MOST_INFO), path) if path.is_file() else {}
    except (OSError, JsonError) as error:
        raise CheckpointError(f"{path} can't be read: {one_line(error)}") from None


def _own_info(file: Path) -> dict:
    """What a file of weights itself says of its training."""
    return _checked_info(_json_object(_metadata(file).get(INFO_KEY), file, "what it says of its training"), file)


def _json_object(text: str | None, path: Path, subject: str) -> dict:
    try:
        record = parse_json(text or "{}", subject)
    except JsonError as error:
        raise CheckpointError(f"{path} can't be read: {one_line(error)}") from None
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} can't be read: {subject} is not a JSON object")
    return record


def _checked_info(info: object, path: Path) -> dict:
    """A record of training. Of what others take from it, the types are right.

    Raises:
        CheckpointError: they aren't.
    """
    if not isinstance(info, dict):
        raise CheckpointError(f"{path} can't be read: what it says of its training is not a JSON object")
    for name, kinds in _INFO_TYPES.items():
        value = info.get(name)
        if value is not None and type(value) not in kinds:  # true is no number here
            words = " or ".join(_WORDS[kind] for kind in kinds)
            raise CheckpointError(f"{path} can't be read: its {name} is {_shown(value)}, not {words}")
    t_n, step = info.get("t_n"), info.get("step")
    if t_n is not None and t_n != MIXED and (isinstance(t_n, str) or not 0 <= t_n <= MAXIMUM_T_N):
        possible = f"possible are 0 to {MAXIMUM_T_N} and {MIXED!r}"
        raise CheckpointError(f"{path} can't be read: its t_n is {_shown(t_n)}; {possible}")
    if step is not None and step < 0:
        raise CheckpointError(f"{path} can't be read: its step is {_shown(step)}, which is below 0")
    return info


def _shown(value: object) -> str:
    return reprlib.repr(value)


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(str(file), "pt") as opened:
            return opened.metadata() or {}
    except DAMAGED_FILE as error:
        raise CheckpointError(f"{file} can't be read: {one_line(error)}") from None


def lora_metadata(file: str | Path) -> dict:
    """peft's configuration inside a LoRA's file (``unet.r``, ``unet.lora_alpha``, …); {} where there is none.

    Raises:
        CheckpointError: unreadable, or a training state of ours that was saved without it at an alpha that isn't its rank:
            a loader would take the rank for alpha, and evaluate a LoRA of another strength.
    """
    file = Path(file)
    config = _json_object(_metadata(file).get(LORA_ADAPTER_METADATA_KEY), file, "its LoRA's configuration")
    if not config and (file.parent / STATE_FILE).is_file() and not _alpha_is_rank(file.parent.parent / "options.json"):
        raise CheckpointError(
            f"{file} was saved without its alpha by an earlier version, so its strength is unknown; "
            "resume the training from it, which saves it anew, or take the run's final weights"
        )
    return config


def _alpha_is_rank(options_file: Path) -> bool:
    try:
        options = read_json(options_file)["options"]
        return options["lora_alpha"] in (None, options["rank"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def step_of(folder: str | Path) -> int | None:
    """The step in the name of a ``checkpoint-<step>`` folder; None for any other name."""
    start, _, step = Path(folder).name.partition("-")
    return int(step) if start == "checkpoint" and step.isdecimal() and step.isascii() else None
