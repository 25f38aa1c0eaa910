"""A run's whole state in files that can't run code: safetensors for tensors, JSON for the rest.

What accelerate would pickle (optimizers, random states, the gradient scaler, registered objects) becomes trees: nested
dictionaries, lists and tuples of numbers, texts and tensors. Weights that are spread over processes (FSDP, DeepSpeed) stay
in those libraries' own formats, which are pickles; :mod:`sdxl_ambient.training.checkpoint` reads them only where they are
signed.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from sdxl_ambient.errors import CheckpointError, one_line
from sdxl_ambient.provenance import parse_json
from sdxl_ambient.training.distributed import is_sharded

_TREE = "tree"
_NUMBERS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError, AttributeError)


# -- trees ------------------------------------------------------------------


def save_tree(path: Path, tree: Any) -> None:
    """Write a tree of dictionaries, lists, tuples, numbers, texts, None and tensors.

    Raises:
        TypeError: anything else in it, which would have to be pickled.
    """
    tensors: dict[str, torch.Tensor] = {}
    described = json.dumps(_described(tree, tensors), allow_nan=False)
    save_file(tensors, str(path), metadata={_TREE: described})


def load_tree(path: Path) -> Any:
    """What :func:`save_tree` wrote, bit for bit; tensors are on the CPU.

    Raises:
        CheckpointError: missing, damaged, or of another kind.
    """
    try:
        with safe_open(str(path), "pt") as file:
            described = (file.metadata() or {})[_TREE]
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        return _built(parse_json(described, str(path)), tensors)
    except _UNREADABLE as error:
        raise CheckpointError(f"{path} is damaged or of another version ({one_line(error)})") from None


def _described(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A value in JSON; its tensors go into ``tensors`` and are called by their numbers."""
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"number": str(float(value))}
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, np.generic):
        return _described(value.item(), tensors)
    if isinstance(value, Mapping):
        pairs = [[_key(key), _described(inner, tensors)] for key, inner in value.items()]
        return {"dict": pairs}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_described(inner, tensors) for inner in value]}
    raise TypeError(f"{type(value).__name__} can't be stored without a pickle")


def _key(key: Any) -> str | int:
    if isinstance(key, str) or type(key) is int:
        return key
    raise TypeError(f"a key of type {type(key).__name__} can't be stored without a pickle")


def _built(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "number":
        return _NUMBERS[inner]
    if kind == "dict":
        return {_key(key): _built(one, tensors) for key, one in inner}
    if kind not in ("list", "tuple"):
        raise ValueError(f"{kind!r} is no kind of value")
    items = [_built(one, tensors) for one in inner]
    return items if kind == "list" else tuple(items)


# -- a run's state ------------------------------------------------------------------


def save_state(accelerator, folder: Path) -> None:
    """Write the weights, optimizers, gradient scaler, registered objects and each process's random state. All call it."""
    if is_sharded(accelerator):
        accelerator.save_state(str(folder))
        return
    folder.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        _save_weights(accelerator, folder)
        for name, thing in _things(accelerator).items():
            save_tree(folder / f"{name}.safetensors", thing.state_dict())
    save_tree(folder / _random_file(accelerator.process_index), random_state())


def load_state(accelerator, folder: Path) -> None:
    """Read what :func:`save_state` wrote. All processes call it.

    Raises:
        CheckpointError: a file that is missing or damaged, or of another model or optimizer.
    """
    if is_sharded(accelerator):
        accelerator.load_state(str(folder))
        return
    _load_weights(accelerator, folder)
    for name, thing in _things(accelerator).items():
        path = folder / f"{name}.safetensors"
        state = load_tree(path)
        try:
            thing.load_state_dict(state)
        except _UNREADABLE as error:
            raise CheckpointError(f"{path} is of another run ({one_line(error)})") from None
    own = folder / _random_file(accelerator.process_index)
    if own.exists():  # with more processes than before there is none, which is told where they are compared
        set_random_state(load_tree(own))


def _things(accelerator) -> dict[str, Any]:
    """Everything beside weights that has a state, by its name in a checkpoint. Accelerate has no public list of them."""
    optimizers = [one.optimizer if hasattr(one, "optimizer") else one for one in accelerator._optimizers]
    found = {f"optimizer{'' if k == 0 else f'_{k}'}": one for k, one in enumerate(optimizers)}
    found |= {f"registered_{k}": one for k, one in enumerate(accelerator._custom_objects)}
    return found | ({"scaler": accelerator.scaler} if accelerator.scaler is not None else {})


def _save_weights(accelerator, folder: Path) -> None:
    models = list(accelerator._models)
    states = [accelerator.get_state_dict(model) for model in models]
    for hook in accelerator._save_model_state_pre_hook.values():
        hook(models, states, str(folder))  # which empties the states that it wrote
    for k, state in enumerate(states):
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, str(folder / _weights_file(k)), metadata={"format": "pt"})


def _load_weights(accelerator, folder: Path) -> None:
    models = list(accelerator._models)
    for hook in accelerator._load_model_state_pre_hook.values():
        hook(models, str(folder))
    for k, model in enumerate(models):
        path = folder / _weights_file(k)
        try:
            accelerator.unwrap_model(model).load_state_dict(load_file(str(path)))
        except _UNREADABLE as error:
            raise CheckpointError(f"{path} is damaged or of another model ({one_line(error)})") from None


def _weights_file(number: int) -> str:
    return "model.safetensors" if number == 0 else f"model_{number}.safetensors"


def _random_file(process: int) -> str:
    return f"random_state_{process}.safetensors"


# -- random states ------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """The states of this process's generators."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (str(kind), np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set them again."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
