"""What a network predicts, told from what it answers, since its scheduler's configuration may say another thing.

A network that is read as what it isn't trains on a wrong loss and draws noise, without an error. Its x̂_0 under each reading
is compared with an x_0 that is known: smooth random fields in place of latents, which every denoiser can tell from white
noise. So no picture is needed, and a base can be checked wherever it is loaded.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from sdxl_ambient.errors import ModelError
from sdxl_ambient.noise import PREDICTION_TYPES, NoiseSchedule

FLOW = "flow matching"  # a reading that can be told, not trained
LEVELS = (0.5, 0.7)  # where x̂_0 is asked for, by the schedule's length
FIELDS = 2
_GRID = 3  # random values per side of a smooth field
_STD = 0.9  # about that of SDXL's latents
# An error (of x̂_0, by x_0's mean square) below which a network has understood its input. Reading nothing at all as v, which
# is the best that can be done without a network, leaves .82.
UNDERSTOOD = 0.75
MARGIN = 1.5  # how many times larger the declared reading's error must be than another's


@torch.no_grad()
def reading_errors(unet: Any, schedule: NoiseSchedule) -> dict[str, float]:
    """The mean squared error of x̂_0, by the mean square of x_0, under each reading of the network's output f.

    ε: (x_t − σf)/α; v: αx_t − σf; x_0: f (Salimans and Ho 2022, appendix D); flow matching: z − sf, where f is asked at
    z = x_t/(α + σ) and s = σ/(α + σ), the same signal to noise on a straight path (Lipman et al. 2023).

    Args:
        unet: an SDXL UNet on any device, in any precision, with or without an adapter; its mode is restored.

    Returns:
        by the names of ``PREDICTION_TYPES``, and "flow matching".
    """
    x_0, noise, t = _inputs(unet, schedule)
    alpha, sigma = (schedule.broadcast(c, x_0) for c in (schedule.alpha(t), schedule.sigma(t)))
    x_t, share = alpha * x_0 + sigma * noise, sigma / (alpha + sigma)
    was_training = unet.training
    unet.eval()
    try:
        answers = _ask(unet, x_t, t.float())
        on_path = _ask(unet, x_t / (alpha + sigma), share.flatten() * schedule.num_timesteps)
    finally:
        unet.train(was_training)
    guesses = {
        "epsilon": (x_t - sigma * answers) / alpha,
        "v_prediction": alpha * x_t - sigma * answers,
        "sample": answers,
        FLOW: x_t / (alpha + sigma) - share * on_path,
    }
    return {name: float((guess - x_0).square().mean() / x_0.square().mean()) for name, guess in guesses.items()}


def check_prediction(unet: Any, schedule: NoiseSchedule, source: str, option: str | None = None) -> None:
    """A network that clearly predicts another quantity than ``schedule`` says is refused.

    One that understands nothing under any reading is let through: it may be a new one.

    Args:
        source: whose UNet it is, as the message names it.
        option: the value of ``--prediction_type``, where that says it.

    Raises:
        ModelError: with both errors, and what to do.
    """
    errors = reading_errors(unet, schedule)
    declared, best = schedule.prediction_type, min(errors, key=errors.__getitem__)
    if not math.isfinite(errors[declared]):
        raise ModelError(f"the UNet of {source} gives values that are not finite; nothing can be drawn or trained with it")
    if best == declared or not errors[best] < UNDERSTOOD or errors[declared] < MARGIN * errors[best]:
        return
    says = f"--prediction_type says {option}" if option else f"its scheduler says {declared}"
    remedy = "flow matching can't be trained or drawn here" if best == FLOW else f"give --prediction_type {best}"
    if best == "epsilon" and schedule.ends_without_signal:
        remedy = "such a network needs a schedule whose last level has a signal left (no rescale_betas_zero_snr, no ztsnr)"
    raise ModelError(
        f"the UNet of {source} predicts {best}, though {says}: what it denoises is wrong by {errors[best]:.2f} of the mean "
        f"square read as {best}, by {errors[declared]:.2f} as {declared}; {remedy}"
    )


def _inputs(unet: Any, schedule: NoiseSchedule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Smooth fields and noise (n, 4, side, side), the same every time, and the level of each (n,)."""
    size = unet.config.sample_size
    side = max(32, (size if isinstance(size, int) else 64) // 2)
    generator = torch.Generator().manual_seed(0)
    shape = FIELDS * len(LEVELS), unet.config.in_channels
    grid = torch.randn(*shape, _GRID, _GRID, generator=generator)
    fields = torch.nn.functional.interpolate(grid, (side, side), mode="bicubic")
    fields = fields / fields.std((1, 2, 3), keepdim=True) * _STD
    levels = [round(share * schedule.num_timesteps) for share in LEVELS for _ in range(FIELDS)]
    return fields, torch.randn(fields.shape, generator=generator), torch.tensor(levels)


def _ask(unet: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The network's answer without a caption, float32 on the CPU. ``t``: (n,) float timesteps."""
    config, (count, *_, side) = unet.config, x.shape
    weight = next(unet.parameters())
    place = {"device": weight.device, "dtype": unet.dtype}
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    pixels = float(8 * side)  # as SDXL's VAE enlarges
    conditioning = {
        "text_embeds": torch.zeros(count, pooled, **place),
        "time_ids": torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]] * count, **place),
    }
    states = torch.zeros(count, 77, config.cross_attention_dim, **place)
    answer = unet(x.to(**place), t.to(weight.device), states, added_cond_kwargs=conditioning).sample
    return answer.float().cpu()


assert set(PREDICTION_TYPES) == {"epsilon", "v_prediction", "sample"}  # those that are read above
