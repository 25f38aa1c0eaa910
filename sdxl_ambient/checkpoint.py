"""Save, rotate, find and resume training states; export what users load. Every file is written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import save_torch_state_dict
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save_file

from sdxl_ambient.config import OptionError
from sdxl_ambient.lora import changes_base, on_the_base, rebase, taken_apart
from sdxl_ambient.manifest import atomic, read_json, write_json

LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_PARTS = ("unet", "text_encoder", "text_encoder_2")
INFO_FILE = "training.json"
INFO_KEY = "sdxl_ambient"  # the same information inside an adapter's own file, under this metadata key
ARCHITECTURE = "stable-diffusion-xl-v1-base"  # as ModelSpec names SDXL; "/lora" is appended as kohya's scripts do
STATE_FILE = "checkpoint.json"
MODEL_FILE = "model.safetensors"  # a fully fine-tuned UNet in a training state, as accelerate stores it


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another run. The message is one line."""


# -- export ----------------------------------------------------------------------


def lora_state(model, state: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The trained LoRA under peft's own names (``….lora_A.weight``), on the CPU.

    Not ``convert_state_dict_to_diffusers``: it renames attention layers only, and the stock loader, which tells the layout
    from the first name, then drops all attention weights of a LoRA that has convolutions too.

    Args:
        state: the module's whole state dict, for one whose weights lie in pieces on several devices
            (``accelerator.get_state_dict`` of the wrapped module); by default its own.
    """
    found = get_peft_model_state_dict(model, state_dict=state, adapter_name="default", save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def save_lora(
    unet,
    folder: str | Path,
    info: dict,
    text_encoders: Sequence | None = None,
    *,
    state: dict[str, torch.Tensor] | None = None,
    text_states: Sequence[dict[str, torch.Tensor] | None] | None = None,
) -> Path:
    """Write ``pytorch_lora_weights.safetensors`` and ``training.json``; a stock pipeline's ``load_lora_weights`` reads it.

    peft's configuration goes along: without it a loader takes alpha for the rank. ``info`` (t_n, objective, …) is stored in
    both files. The weights are those for the base as it is distributed, however the LoRA was started.

    Args:
        unet: the model itself, out of any distributed wrapper, with a LoRA.
        text_encoders: both, likewise, where they have one too.
        state, text_states: their whole state dicts, where they are sharded; see :func:`lora_state`.
    """
    path = Path(folder) / LORA_FILE
    with atomic(path) as temporary:
        _write_lora(_parts(unet, text_encoders), temporary, [state, *(text_states or ())])
        _add_info(temporary, info)
    write_json(Path(folder) / INFO_FILE, public_info(info))
    return path


def _parts(unet, text_encoders: Sequence | None) -> dict[str, torch.nn.Module]:
    """Whose LoRA goes into a file, by the names that diffusers has for them."""
    return dict(zip(LORA_PARTS, (unet, *(text_encoders or ())), strict=False))


def _write_lora(parts: dict[str, torch.nn.Module], path: Path, states: Sequence = ()) -> None:
    given = {}
    for (part, model), state in zip_longest(parts.items(), states):
        weights, config = _for_file(part, model, state)
        given |= {f"{part}_lora_layers": weights, f"{part}_lora_adapter_metadata": config}
    StableDiffusionXLPipeline.save_lora_weights(str(path.parent), **given, weight_name=path.name)


def _for_file(part: str, model, state=None) -> tuple[dict[str, torch.Tensor], dict]:
    """A part's weights, by their names in the file but for the part's own, and peft's configuration of them."""
    # Sets have no order and do not go into JSON.
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in model.peft_config["default"].to_dict().items()}
    config["base_model_name_or_path"] = None  # where it lies on this machine is nobody's business
    weights, config = on_the_base(model, lora_state(model, state), config)
    return {in_file(part, name): tensor for name, tensor in weights.items()}, config


def in_file(part: str, name: str) -> str:
    """Text encoders have their layers in text_model or not, by the version of transformers; loaders take this for both.

    transformers drops DoRA's magnitudes under the name that peft gives them.
    """
    if part == "unet":
        return name
    return f"text_model.{name.removeprefix('text_model.')}" + (".weight" if name.endswith(".lora_magnitude_vector") else "")


def _add_info(path: Path, info: dict) -> None:
    with safe_open(str(path), "pt") as file:
        own = {**(file.metadata() or {}), **model_metadata(info, f"{ARCHITECTURE}/lora", "diffusers")}
    # From bytes: load_file maps the file, and writing to a mapped file pulls the tensors from under one's feet.
    save_file(load(path.read_bytes()), str(path), metadata=own)


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
    found = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": implementation,
        "modelspec.title": title or _title(info),
        "modelspec.date": info.get("date"),
        "modelspec.resolution": size and "x".join(map(str, size)),
        "modelspec.prediction_type": {"v_prediction": "v"}.get(info.get("prediction_type"), info.get("prediction_type")),
        # Levels that were never trained: a loader that heeds this keeps them the base model's.
        "modelspec.timestep_range": f"{t_n + 1},999" if objective == "skip" and isinstance(t_n, int) else None,
        f"{INFO_KEY}.t_n": ("none" if t_n is None else t_n) if "t_n" in info else None,
        f"{INFO_KEY}.objective": objective and ("denoising" if t_n is None else f"ambient, {objective} at t <= t_n"),
        f"{INFO_KEY}.base_model": info.get("base_model"),
        f"{INFO_KEY}.data": info.get("data"),
        INFO_KEY: json.dumps(info, sort_keys=True),
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def _title(info: dict) -> str:
    facts = [f"{name} {info[name]}" for name in ("t_n", "step") if info.get(name) is not None]
    return " ".join(["SDXL Ambient", info.get("finetune") or "LoRA", *([f"({', '.join(facts)})"] if facts else [])])


def load_lora_state(unet, path: str | Path, text_encoders: Sequence | None = None) -> None:
    """Put a saved LoRA's weights into the adapters that the models already have (a resume adds no second one).

    Raises:
        CheckpointError: unreadable, or of another rank, other targets or other parts; nothing is loaded then.
    """
    try:
        stored = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from None
    parts = _parts(unet, text_encoders)
    want = {f"{part}.{n}": w.shape for part, model in parts.items() for n, w in _for_file(part, model)[0].items()}
    if have := stored.keys() - want.keys() or want.keys() - stored.keys():
        missing = len(want.keys() - stored.keys())
        raise CheckpointError(
            f"{path} holds another LoRA: {missing} weights missing, {len(stored.keys() - want.keys())} unknown ({min(have)})"
        )
    if wrong := [name for name, shape in want.items() if stored[name].shape != shape]:
        shapes = f"{tuple(stored[wrong[0]].shape)} instead of {tuple(want[wrong[0]])}"
        raise CheckpointError(f"{path} holds a LoRA of another shape: {wrong[0]} is {shapes}")
    for part, model in parts.items():
        state = {name: stored[f"{part}.{in_file(part, name)}"] for name in lora_state(model)}
        if changes_base(model):
            state, initial = taken_apart(state)
            rebase(model, initial)
        set_peft_model_state_dict(model, state, adapter_name="default")


def save_unet(unet, folder: str | Path, info: dict, *, state: dict[str, torch.Tensor] | None = None) -> Path:
    """Write a fully fine-tuned UNet to ``folder/unet``, loadable with ``UNet2DConditionModel.from_pretrained``.

    Args:
        state: its whole state dict, where it is sharded; see :func:`lora_state`.
    """
    final, temporary = Path(folder) / "unet", Path(folder) / ".unet.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    unet.save_config(str(temporary))
    config = temporary / UNet2DConditionModel.config_name
    # Sharded, the class has another name, which no loader knows.
    write_json(config, {**read_json(config), "_class_name": UNet2DConditionModel.__name__})
    # What save_pretrained does, which takes no state dict.
    weights = unet.state_dict() if state is None else state
    pattern = SAFETENSORS_WEIGHTS_NAME.replace(".", "{suffix}.")
    save_torch_state_dict(weights, str(temporary), filename_pattern=pattern, max_shard_size="10GB")
    replace_folder(temporary, final)
    write_json(Path(folder) / INFO_FILE, public_info(info))
    return final


def read_training_info(path: str | Path) -> dict:
    """What training recorded about a LoRA or a UNet (folder or file), or a training state; {} where nothing is recorded.

    Raises:
        CheckpointError: a record that can't be read.
    """
    path = Path(path)
    if path.is_file():
        own = _json(_metadata(path).get(INFO_KEY), path) if path.suffix == ".safetensors" else {}
        return own or (read_training_info(path.parent) if path.name in (LORA_FILE, MODEL_FILE) else {})
    if info := _info_file(path):
        return info
    if (path / LORA_FILE).is_file() and (info := _json(_metadata(path / LORA_FILE).get(INFO_KEY), path / LORA_FILE)):
        return info
    if path.name == "unet":
        return read_training_info(path.parent)
    # A training state of an earlier version has no record of its own; the run's holds for it but for the step.
    if (step := step_of(path)) is not None and (info := _info_file(path.parent)):
        return {**info, "step": step}
    return {}


def _info_file(folder: Path) -> dict:
    path = folder / INFO_FILE
    return _json(path.read_text(encoding="utf-8"), path) if path.is_file() else {}


def _json(text: str | None, path: Path) -> dict:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} can't be read: what it says of its training is not a JSON object")
    return found


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(str(file), "pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} can't be read: {error}") from None


def lora_metadata(file: str | Path) -> dict:
    """peft's configuration inside a LoRA's file (``unet.r``, ``unet.lora_alpha``, …); {} where there is none.

    Raises:
        CheckpointError: unreadable, or a training state of ours that was saved without it at an alpha that isn't its rank:
            a loader would take the rank for alpha, and evaluate a LoRA of another strength.
    """
    file = Path(file)
    found = _json(_metadata(file).get(LORA_ADAPTER_METADATA_KEY), file)
    if not found and (file.parent / STATE_FILE).is_file() and not _alpha_is_rank(file.parent.parent / "options.json"):
        raise CheckpointError(
            f"{file} was saved without its alpha by an earlier version, so its strength is unknown; "
            "resume the training from it, which saves it anew, or take the run's final weights"
        )
    return found


def _alpha_is_rank(options_file: Path) -> bool:
    try:
        options = read_json(options_file)["options"]
        return options["lora_alpha"] in (None, options["rank"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def replace_folder(temporary: Path, final: Path) -> None:
    """Rename a finished folder into place; the one it replaces is gone only once the new one is there."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(temporary, final)
    shutil.rmtree(old, ignore_errors=True)


# -- training states ----------------------------------------------------------------------


def register_lora_hooks(accelerator, unet, text_encoders: Sequence | None = None) -> None:
    """Make ``accelerator.save_state`` store the LoRA alone, instead of whole models, and ``load_state`` read it back.

    The models are out of their wrappers, and whole: where FSDP or DeepSpeed shards them, accelerate stores them its own way.
    All parts are in one file, the one that users load.
    """
    parts = _parts(unet, text_encoders)

    def save(models, weights, folder):
        weights.clear()
        if accelerator.is_main_process:
            _write_lora(parts, Path(folder) / LORA_FILE)

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
        _add_info(folder / LORA_FILE, info)
    write_json(folder / INFO_FILE, public_info(info))


def step_of(folder: str | Path) -> int | None:
    """The step in the name of a ``checkpoint-<step>`` folder; None for any other name."""
    start, _, step = Path(folder).name.partition("-")
    return int(step) if start == "checkpoint" and step.isdecimal() and step.isascii() else None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """All ``checkpoint-<step>`` folders, the earliest step first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if p.is_dir() and step_of(p) is not None]
    return sorted(found, key=step_of)


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
