"""What training needs of the device's memory, in bytes, part by part.

Weights, gradients, optimizer states and averages follow from the shapes. Activations are counted in one forward pass, of
which nothing is kept; with fake tensors (``torch._subclasses.FakeTensorMode``) no memory is needed for that at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager

import torch
from torch.multiprocessing.reductions import StorageWeakRef

# Temporary tensors of an optimizer that updates one weight after the other, in units of the largest weight.
_TEMPORARIES = 3
# They update all weights together, and meanwhile hold one more copy of them.
_TOGETHER = ("adamw", "adamw_schedulefree")


def estimate(
    modules: torch.nn.Module | list[torch.nn.Module],
    *,
    forward: Callable[[], object] | None = None,
    optimizer: str = "adamw",
    extra: dict | None = None,
    fused_backward_pass: bool = False,
    use_ema: bool = False,
    offload_ema: bool = False,
) -> dict[str, int]:
    """Bytes of training ``modules`` as they are: LoRA attached, gradient checkpointing and training mode set.

    Args:
        modules: all that is on the device; what requires a gradient is trained.
        forward: runs one forward pass of a training batch with graph and autocast as in training; nothing is counted without
            it. With several passes in a step, as the consistency loss has, it runs them all.
        optimizer, extra, fused_backward_pass, use_ema, offload_ema: as the options of those names; ``extra`` is what
            ``--optimizer_args`` gives. ``use_ema`` also stands for averages that restore and the consistency loss hold.

    Returns:
        ``weights``; ``gradients``; ``optimizer`` states; ``averages`` on the device; ``activations`` that the backward pass
        waits for, at most; ``step``, what the optimizer's step or the averaging holds for a moment; ``total`` on the device,
        in which activations and step don't meet unless the backward pass is fused; and ``processor``, averages that are in
        the processor's memory. Not in it: the CUDA context, the allocator's fragments, workspaces, temporaries of a layer.
    """
    modules = [modules] if isinstance(modules, torch.nn.Module) else list(modules)
    trained = list(dict.fromkeys(p for m in modules for p in m.parameters() if p.requires_grad))
    whole, largest = (f([p.nbytes for p in trained] or [0]) for f in (sum, max))
    together = optimizer in _TOGETHER and not fused_backward_pass
    averaged = use_ema and not offload_ema
    parts = {
        "weights": held_bytes(modules),
        "gradients": largest if fused_backward_pass else whole,
        "optimizer": sum(state_bytes(optimizer, p, extra) for p in trained) + _tables(optimizer, trained),
        "averages": whole if averaged else 0,
        "activations": activation_bytes(forward, modules) if forward else 0,
        "step": whole if together or averaged else _TEMPORARIES * largest,
    }
    kept = sum(parts[n] for n in ("weights", "gradients", "optimizer", "averages"))
    meet = sum if fused_backward_pass else max
    return {
        **parts,
        "total": kept + meet([parts["activations"], parts["step"]]),
        "processor": whole if use_ema and offload_ema else 0,
    }


# -- weights and states ----------------------------------------------------------------------


class Storages:
    """Memory that tensors lie in, each piece counted once, and none of it kept alive."""

    def __init__(self, tensors: Iterable[torch.Tensor] = ()):
        self.sizes, self.bytes = {}, 0
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        # The reference holds no memory, but keeps the storage's address from being given to another.
        reference = StorageWeakRef(storage)
        if reference.cdata not in self.sizes:
            self.sizes[reference.cdata] = (reference, storage.nbytes())
            self.bytes += storage.nbytes()

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.sizes


def _held(modules: Iterable[torch.nn.Module]) -> Storages:
    """Parameters and buffers, and the scales of those that are held in fewer bits."""
    held = Storages()
    for module in (m for top in modules for m in top.modules()):
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            held.add(tensor)
            _add_scales(held, tensor)
        _add_scales(held, getattr(module, "state", None))
    return held


def _add_scales(held: Storages, holder) -> None:
    """bitsandbytes keeps them beside a weight (int8: or in the layer's ``state``); a state may hold another."""
    nested = getattr(holder, "quant_state", None)
    while nested is not None:
        for name in ("absmax", "code", "offset"):
            if isinstance(value := getattr(nested, name, None), torch.Tensor):
                held.add(value)
        nested = getattr(nested, "state2", None)
    if isinstance(scales := getattr(holder, "SCB", None), torch.Tensor):
        held.add(scales)


def held_bytes(modules: Iterable[torch.nn.Module]) -> int:
    """Bytes of all parameters and buffers as they are held, each once."""
    return _held(modules).bytes


def state_bytes(optimizer: str, weight: torch.Tensor, extra: dict | None = None) -> int:
    """Bytes of an optimizer's state of one weight, without its count of steps, after its first step.

    A weight that is zero at the start, as half of a LoRA's are, has one tensor less in Prodigy.
    """
    extra, count, size = extra or {}, weight.numel(), weight.element_size()
    if optimizer == "adamw8bit" and count >= extra.get("min_8bit_size", 4096):
        return 2 * count + 2 * 4 * -(-count // 256)  # a byte each, and a float32 per block of 256
    if optimizer == "adafactor":
        *outer, rows, columns = weight.shape if weight.ndim > 1 else (0, 0)
        squares = torch.Size(outer).numel() * (rows + columns) if weight.ndim > 1 else count
        return 4 * squares + (size * count if extra.get("beta1") is not None else 0) + 4  # and the weight's norm
    if optimizer == "prodigy":
        return size * 2 * count + size * 2 * -(-count // extra.get("slice_p", 1))
    more = 1 if optimizer == "adamw" and extra.get("amsgrad") else 0
    return (2 + more) * count * (4 if optimizer == "adamw8bit" else size)


def _tables(optimizer: str, trained: Sequence[torch.Tensor]) -> int:
    """The two tables of 256 values that all 8-bit states share."""
    return 2 * 4 * 256 if optimizer == "adamw8bit" and any(p.numel() >= 4096 for p in trained) else 0


# -- activations ----------------------------------------------------------------------


class Activations:
    """Counts what autograd keeps during a forward pass, and lets go of it, so that no backward pass can follow.

    A block under gradient checkpointing keeps what it is given. When it is computed again, what was kept before it is still
    there, and what came after it is gone.
    """

    def __init__(self, modules: Iterable[torch.nn.Module]):
        self.modules = list(modules)
        self.held, self.kept = _held(self.modules), Storages()
        self.recomputing, self.casts = 0, 0

    def _count(self, into: Storages):
        def pack(tensor: torch.Tensor):
            if tensor not in self.held:
                into.add(tensor)
            self._note_autocast(tensor.device.type)

        return torch.autograd.graph.saved_tensors_hooks(pack, _gone)

    def _note_autocast(self, device: str) -> None:
        if torch.is_autocast_enabled(device) and torch.is_autocast_cache_enabled() and not self.casts:
            size = torch.get_autocast_dtype(device).itemsize
            single = [p for m in self.modules for p in m.parameters() if p.requires_grad and p.dtype == torch.float32]
            self.casts = size * sum(p.numel() for p in single)

    def _block(self, function, *args, **keywords):
        """In place of a checkpoint."""
        for value in (*args, *keywords.values()):
            if isinstance(value, torch.Tensor) and value not in self.held:
                self.kept.add(value)
        inside = Storages()
        with self._count(inside):
            output = function(*args, **keywords)
        new = sum(size for key, (_, size) in inside.sizes.items() if key not in self.kept.sizes)
        self.recomputing = max(self.recomputing, self.kept.bytes + new)
        return output

    @contextmanager
    def counting(self):
        """Counts the forward passes within it."""
        checkpointed = [m for top in self.modules for m in top.modules() if getattr(m, "gradient_checkpointing", False)]
        name = "_gradient_checkpointing_func"  # where diffusers' modules keep what runs a block
        before = [getattr(m, name) for m in checkpointed]
        for module in checkpointed:
            setattr(module, name, self._block)
        try:
            with self._count(self.kept):
                yield self
        finally:
            for module, function in zip(checkpointed, before, strict=True):
                setattr(module, name, function)

    @property
    def bytes(self) -> int:
        """At most, at once.

        Until the forward pass ends, autocast keeps trained weights in half precision, too. Without checkpointing they are
        among what autograd keeps.
        """
        return max(self.recomputing, self.kept.bytes + self.casts) if self.recomputing else self.kept.bytes


def _gone(_):
    raise RuntimeError("this forward pass was counted only; no backward pass can follow it")


def activation_bytes(forward: Callable[[], object], modules: Iterable[torch.nn.Module]) -> int:
    """Bytes that a forward pass of ``modules`` leaves for the backward pass, at most at once, beside their own weights."""
    with Activations(modules).counting() as counted, torch.enable_grad():
        forward()
    return counted.bytes
