"""The algebra, the objective and the samplers on a GPU, in float32, bfloat16 and float16, against float64 on the CPU."""

import copy

import numpy as np
import pytest
import torch

from sdxl_ambient.levels import CLEAN
from sdxl_ambient.models.denoiser import Conditioning, Denoiser
from sdxl_ambient.objective import ExtraRows, ObjectiveOptions, ambient_loss, ambient_objective
from sdxl_ambient.pipeline import load_pipeline, sample
from sdxl_ambient.posterior import posterior_mean
from sdxl_ambient.randomness import sample_generator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
LEVELS = torch.tensor([CLEAN, 0, 100, 500, 500, 998])
TIMES = torch.tensor([0, 1, 101, 501, 900, 999])


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """float32 convolutions in float32: cuDNN takes TF32 for them by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def conditioning(unet, count):
    generator = torch.Generator().manual_seed(1)
    width, pooled = unet.config.cross_attention_dim, unet.config.projection_class_embeddings_input_dim - 6 * 32
    return Conditioning(
        torch.randn(count, 77, width, generator=generator),
        torch.randn(count, pooled, generator=generator),
        torch.tensor([64.0, 64, 0, 0, 64, 64]).expand(count, 6),
    )


def relative(found, want):
    return float((found.double().cpu() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_algebra(schedule, dtype):
    x, z = (torch.randn(6, 4, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(2))
    below = (TIMES - 1).clamp(min=0)
    want = schedule.renoise(x, LEVELS, TIMES, z), schedule.reverse_step(x, z, TIMES.clamp(min=1), below, x)
    x, z, times, levels, below = (v.cuda() for v in (x.to(dtype), z.to(dtype), TIMES, LEVELS, below))
    found = schedule.renoise(x, levels, times, z), schedule.reverse_step(x, z, times.clamp(min=1), below, x)
    assert all(relative(f, w) < TOLERANCE[dtype] for f, w in zip(found, want, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_ambient_loss_and_gradient(unet, schedule, dtype):
    x, xi = (torch.randn(6, 4, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(2))

    def loss_and_gradient(device, network_dtype, x, xi):
        network = copy.deepcopy(unet).to(device, network_dtype).requires_grad_(True)
        denoise = Denoiser(network, conditioning(unet, 6).to(device, network_dtype), network_dtype)
        loss = ambient_loss(denoise, schedule, x.to(device), LEVELS, TIMES, xi.to(device))
        loss.mean().backward()
        return loss.detach(), network.conv_in.weight.grad

    want, want_gradient = loss_and_gradient("cpu", torch.float64, x, xi)
    found, gradient = loss_and_gradient("cuda", dtype, x.float(), xi.float())
    assert found.dtype == torch.float32
    assert relative(found, want) < TOLERANCE[dtype]
    assert relative(gradient, want_gradient) < 5 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("anchor", ["ambient", "boundary", "chain"])
def test_whole_objective_is_finite_and_does_not_depend_on_the_device(unet, schedule, dtype, anchor):
    x = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    options = ObjectiveOptions(consistency_weight=1.0, consistency_anchor=anchor, t_sampling="near", weighting="min_snr")

    def run(device, dtype):
        network = copy.deepcopy(unet).to(device, dtype)
        both = conditioning(unet, 8).to(device, dtype)
        restored = ExtraRows(x[:2], torch.tensor([500, 100]))
        generators = [sample_generator(0, "test", i) for i in range(8)]
        return ambient_objective(
            Denoiser(network, both, dtype), schedule, x.to(device), LEVELS, generators, options, restored
        )

    want, found = run("cpu", torch.float32), run("cuda", dtype)
    assert torch.equal(found.t, want.t)
    for name in ("ambient", "restored", "consistency"):
        a, b = getattr(found, name), getattr(want, name)
        assert bool(torch.isfinite(a).all()), name
        # A consistency estimate is a product of differences of nearly equal numbers.
        if name != "consistency":
            assert relative(a, b.double()) < 2 * TOLERANCE[dtype], name
        elif dtype == torch.float32:
            assert relative(a, b.double()) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sampler", ["full", "early_stop", "hybrid"])
def test_samplers(miniature, sampler, dtype):
    def draw(device, dtype):
        pipe = load_pipeline(str(miniature), dtype=dtype).to(device)
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        images = sample(
            pipe, ["green heart", "red apple"], sampler=sampler, t_n=500, generators=generators, num_inference_steps=10,
            base_unet=pipe.unet if sampler == "hybrid" else None,
        )  # fmt: skip
        return torch.stack([torch.tensor(np.asarray(i).copy()) for i in images]).double() / 255

    difference = (draw("cuda", dtype) - draw("cpu", torch.float32)).abs().mean()
    assert difference < {torch.float32: 0.005}.get(dtype, 0.05)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_posterior_mean_at_the_ends_of_the_schedule(schedule, dtype):
    x = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 1, 998, 999])
    want = posterior_mean(lambda x, t: x.tanh(), schedule, x.double(), t)
    found = posterior_mean(lambda x, t: x.to(dtype).tanh(), schedule, x.cuda(), t.cuda())
    assert found.dtype == torch.float32 and relative(found, want) < 2 * TOLERANCE[dtype]
