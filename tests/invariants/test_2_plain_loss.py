"""Invariant 2: clean data gives the plain denoising loss exactly."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from support.schedules import SDXL, sdxl

from sdxl_ambient.levels import CLEAN
from sdxl_ambient.models.denoiser import Conditioning, Denoiser
from sdxl_ambient.noise import levels
from sdxl_ambient.objective import ambient_loss, ambient_objective
from sdxl_ambient.randomness import Randomness


@pytest.fixture(scope="module")
def conditioning():
    generator = torch.Generator().manual_seed(1)
    return Conditioning(
        torch.randn(4, 77, 80, generator=generator),
        torch.randn(4, 48, generator=generator),
        torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 4),
    )


def test_clean_data_gives_the_plain_loss_and_gradients_bit_for_bit(unet, conditioning):
    plain, ambient = copy.deepcopy(unet).requires_grad_(True), copy.deepcopy(unet).requires_grad_(True)
    pooled_width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    conditioning.pooled = conditioning.pooled[:, :pooled_width]
    scheduler, schedule = DDPMScheduler(**SDXL), sdxl()
    x_0 = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    losses = ambient_objective(
        Denoiser(ambient, conditioning), schedule, x_0, levels(None, 4), torch.Generator().manual_seed(3)
    )
    losses.total.backward()

    # What the diffusers examples do, with the same draws.
    randomness = Randomness(torch.Generator().manual_seed(3), len(x_0))
    noise = (randomness.uniform(), randomness.normal(x_0))[1]
    noisy = scheduler.add_noise(x_0, noise, losses.t)
    prediction = plain(
        noisy,
        losses.t,
        encoder_hidden_states=conditioning.prompt_embeds,
        added_cond_kwargs={"text_embeds": conditioning.pooled, "time_ids": conditioning.time_ids},
    ).sample
    per_sample = F.mse_loss(prediction.float(), noise.float(), reduction="none")
    per_sample = per_sample.mean(dim=list(range(1, per_sample.ndim)))
    per_sample.mean().backward()
    assert torch.equal(losses.ambient, per_sample)
    assert torch.equal(losses.total, per_sample.mean())
    for (name, p), q in zip(plain.named_parameters(), ambient.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    # The examples without SNR weights take the mean over everything at once: equal up to the order of summation.
    plain.zero_grad()
    whole = F.mse_loss(plain(
        noisy, losses.t, encoder_hidden_states=conditioning.prompt_embeds,
        added_cond_kwargs={"text_embeds": conditioning.pooled, "time_ids": conditioning.time_ids},
    ).sample.float(), noise.float(), reduction="mean")  # fmt: skip
    whole.backward()
    torch.testing.assert_close(losses.total, whole, rtol=1e-6, atol=0)
    for (name, p), q in zip(plain.named_parameters(), ambient.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_clean_samples_in_a_mixed_batch_have_the_plain_loss():
    schedule = sdxl()
    x, xi, output = (torch.randn(3, 4, 8, 8) for _ in range(3))
    t_n, t = torch.tensor([CLEAN, 300, CLEAN]), torch.tensor([5, 600, 999])
    loss = ambient_loss(lambda x_t, t: output, schedule, x, t_n, t, xi)
    plain = F.mse_loss(output, xi, reduction="none").mean((1, 2, 3))
    assert torch.equal(loss[[0, 2]], plain[[0, 2]]) and loss[1] != plain[1]
