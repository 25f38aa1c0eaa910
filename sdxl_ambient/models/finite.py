"""Looks at weights that were read: one that isn't a finite number makes every picture, loss and figure worthless."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from sdxl_ambient.errors import ModelError, UserError

_PIECE = 1 << 24  # numbers that are converted at a time, of types that have no minimum of their own


def check_finite(
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    source: str,
    error: type[UserError] = ModelError,
) -> None:
    """Refuse NaN, infinity and tensors without values. Each tensor is read once, in its own precision.

    A pass takes about 8 GB/s on one core in float32, 4 in half precision: two seconds for all of SDXL.

    Args:
        tensors: by name; of an iterator one is held at a time.
        source: what the message names first, such as "the UNet 'run/unet'".
        error: what is raised.

    Raises:
        ModelError, or ``error``: it names the first such tensor.
    """
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        if tensor.is_meta:
            raise error(f"{source}: {name} is missing")
        if not is_finite(tensor):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise error(
                f"{source}: {name} holds NaN or infinity in {kind}, so the weights are damaged or don't fit in {kind}"
            )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are finite; true for whole numbers and for none at all."""
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.element_size() < 2:
        return all(_is_finite(piece.float()) for piece in tensor.flatten().split(_PIECE))
    return _is_finite(tensor)


def _is_finite(tensor: torch.Tensor) -> bool:
    # NaN goes into both. Several times faster than isfinite, which writes as many answers as there are numbers.
    ends = torch.stack(torch.aminmax(tensor.detach()))
    return bool(torch.isfinite(ends).all())
