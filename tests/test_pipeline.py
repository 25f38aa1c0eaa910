"""Sampling: full is the stock pipeline, early_stop ends at exactly t_n, hybrid leaves the levels below to the base."""

import copy

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from peft.tuners.tuners_utils import BaseTunerLayer

from sdxl_ambient.checkpoint import save_lora, save_unet
from sdxl_ambient.models import ModelError, add_lora
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.pipeline import adapter_t_n, euler_like, load_pipeline, sample, timestep_grid

PROMPTS = ["red apple", "green heart", "penguin"]
T_N = 437  # not a step of any grid here


def generators(*seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]


@pytest.fixture(scope="module")
def lora(unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    tuned = copy.deepcopy(unet)
    add_lora(tuned, rank=4, alpha=8, targets=["attention"])
    generator = torch.Generator().manual_seed(0)
    for p in tuned.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    save_lora(tuned, folder, {"t_n": T_N})
    return folder


@pytest.fixture(scope="module")
def base(miniature):
    return load_pipeline(str(miniature))


@pytest.fixture(scope="module")
def tuned(miniature, lora):
    return load_pipeline(str(miniature), lora=lora)


def draw(pipe, sampler="full", seeds=(0, 1, 2), prompts=PROMPTS, **keywords):
    keywords = {"num_inference_steps": 6, "output_type": "latent", **keywords}
    return sample(pipe, prompts[: len(seeds)], sampler=sampler, generators=generators(*seeds), **keywords)


class Recorder:
    """Forward hook: the timestep, whether adapters are on, the inputs and the output of every call of a UNet."""

    def __init__(self, *unets):
        self.calls, self.handles = [], [u.register_forward_hook(self, with_kwargs=True) for u in unets]

    def __call__(self, module, arguments, keywords, output):
        layers = [m for m in module.modules() if isinstance(m, BaseTunerLayer)]
        states = {bool(m.active_adapters) and not m.disable_adapters for m in layers} or {False}
        assert len(states) == 1
        self.calls.append((float(arguments[1]), states.pop(), id(module), arguments[0].clone(), output[0].clone()))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.remove()

    @property
    def times(self):
        return [call[0] for call in self.calls]


# -- full ---------------------------------------------------------------------------------------------------------


def test_full_is_the_stock_pipeline_bit_for_bit(base, miniature):
    stock = StableDiffusionXLPipeline.from_pretrained(miniature, add_watermarker=False)
    stock.set_progress_bar_config(disable=True)
    keywords = dict(num_inference_steps=5, guidance_scale=4.0, height=64, width=64, negative_prompt=["dog"] * 3)
    want = stock(PROMPTS, generator=generators(0, 1, 2), **keywords).images
    keywords["negative_prompts"] = keywords.pop("negative_prompt")
    got = sample(base, PROMPTS, generators=generators(0, 1, 2), **keywords)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(want, got, strict=True))
    assert got[0].size == (64, 64)


@pytest.mark.parametrize("sampler", ["full", "early_stop", "hybrid"])
def test_an_image_does_not_depend_on_its_batch(tuned, sampler):
    together = draw(tuned, sampler, t_n=T_N)
    for i in range(3):
        alone = draw(tuned, sampler, seeds=(i,), prompts=PROMPTS[i:], t_n=T_N)
        # What is left is the rounding of convolutions over other batches; latents are of order 1.
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-3)


# -- early_stop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t_n", [T_N, 1, 500])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_early_stop_ends_at_exactly_t_n_with_one_denoised_estimate(tuned, t_n, guidance):
    with Recorder(tuned.unet) as recorder:
        got = draw(tuned, "early_stop", t_n=t_n, guidance_scale=guidance)
    assert recorder.times[-1] == t_n and all(t > t_n for t in recorder.times[:-1])
    assert recorder.times == sorted(set(recorder.times), reverse=True)
    assert all(on for _, on, *_ in recorder.calls)
    # x̂_0 by hand from what the network saw and said at t_n; the network sees x_t itself (variance preserving).
    x_t, epsilon = recorder.calls[-1][3:]
    if guidance > 1:
        negative, positive = epsilon.chunk(2)
        epsilon, x_t = negative + guidance * (positive - negative), x_t.chunk(2)[0]
    schedule = NoiseSchedule.from_scheduler(tuned.scheduler)
    want = schedule.x_0(epsilon, x_t, torch.full((3,), t_n))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# -- hybrid ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t_n", [T_N, 0, 1, 500])
def test_hybrid_has_the_adapter_on_above_t_n_and_nowhere_else(tuned, t_n):
    with Recorder(tuned.unet) as recorder:
        draw(tuned, "hybrid", t_n=t_n)
    assert t_n in recorder.times and max(recorder.times) > t_n
    assert [on for _, on, *_ in recorder.calls] == [t > t_n for t in recorder.times]


def test_hybrid_is_the_tuned_model_above_and_exactly_the_base_below(tuned, base):
    with Recorder(tuned.unet) as recorder:
        hybrid = draw(tuned, "hybrid", t_n=T_N, guidance_scale=1.0)
    with Recorder(tuned.unet) as early:
        draw(tuned, "early_stop", t_n=T_N, guidance_scale=1.0)
    above = [c for c in recorder.calls if c[0] > T_N]
    for a, b in zip(above, early.calls, strict=False):
        assert a[0] == b[0] and torch.equal(a[3], b[3]) and torch.equal(a[4], b[4])
    # Below, the base pipeline goes on from the state that was handed over.
    first = len(above)
    times = [int(t) for t in recorder.times]
    scheduler = euler_like(base.scheduler)
    scheduler.set_timesteps(timesteps=times)
    x = recorder.calls[first][3] * (scheduler.sigmas[first] ** 2 + 1) ** 0.5
    prompt, _, pooled, _ = base.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 3)
    for t in scheduler.timesteps[first:]:
        added = {"text_embeds": pooled, "time_ids": ids}
        with torch.no_grad():
            epsilon = base.unet(scheduler.scale_model_input(x, t), t, prompt, added_cond_kwargs=added).sample
        x = scheduler.step(epsilon, t, x).prev_sample
    torch.testing.assert_close(hybrid, x, rtol=1e-5, atol=1e-5)
    assert (hybrid - draw(tuned, guidance_scale=1.0)).abs().max() > 1e-2
    assert (hybrid - draw(base, guidance_scale=1.0)).abs().max() > 1e-2


def test_hybrid_of_a_full_fine_tune_hands_over_to_the_base_unet(miniature, base, tuned, lora, tmp_path):
    """A LoRA merged into the weights must sample as the LoRA does."""
    merged = load_pipeline(str(miniature), lora=lora)
    merged.fuse_lora()
    merged.unload_lora_weights()
    save_unet(merged.unet, tmp_path, {"t_n": 300})
    assert adapter_t_n(tmp_path) == adapter_t_n(tmp_path / "unet") == 300
    full = load_pipeline(str(miniature), unet=tmp_path)
    own = full.unet
    with Recorder(full.unet, base.unet) as recorder:
        got = draw(full, "hybrid", t_n=T_N, base_unet=base.unet)
    assert [c[2] for c in recorder.calls] == [id(own if t > T_N else base.unet) for t in recorder.times]
    torch.testing.assert_close(got, draw(tuned, "hybrid", t_n=T_N), rtol=1e-4, atol=1e-4)
    assert full.unet is own


# -- afterwards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["early_stop", "hybrid"])
def test_the_pipeline_is_as_before_afterwards(tuned, sampler):
    scheduler, unet = tuned.scheduler, tuned.unet
    want = draw(tuned)
    draw(tuned, sampler, t_n=T_N)
    assert tuned.scheduler is scheduler and tuned.unet is unet
    assert torch.equal(draw(tuned), want)


@pytest.mark.parametrize("with_base", [False, True])
def test_the_pipeline_is_as_before_after_an_exception(tuned, base, with_base):
    scheduler, unet, want = tuned.scheduler, tuned.unet, draw(tuned)

    def fail(module, arguments, keywords):
        if float(arguments[1]) <= T_N:
            raise RuntimeError("out of memory")

    hooks = [u.register_forward_pre_hook(fail, with_kwargs=True) for u in (tuned.unet, base.unet)]
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            draw(tuned, "hybrid", t_n=T_N, base_unet=base.unet if with_base else None)
    finally:
        for hook in hooks:
            hook.remove()
    assert tuned.scheduler is scheduler and tuned.unet is unet and torch.equal(draw(tuned), want)


def test_other_schedulers_of_the_same_levels_serve_too(miniature, lora, tuned):
    pipe = load_pipeline(str(miniature), lora=lora)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert timestep_grid(euler_like(pipe.scheduler), 6) == timestep_grid(euler_like(tuned.scheduler), 6)
    torch.testing.assert_close(draw(pipe, "hybrid", t_n=T_N), draw(tuned, "hybrid", t_n=T_N), rtol=1e-4, atol=1e-4)


# -- loading and errors ----------------------------------------------------------------------------------------------


def test_adapters_load_with_their_scale_and_level(miniature, lora, tuned, base):
    assert adapter_t_n(lora) == T_N == adapter_t_n(lora / "pytorch_lora_weights.safetensors")
    assert adapter_t_n(miniature) is None
    want = draw(tuned)
    file = load_pipeline(str(miniature), lora=lora / "pytorch_lora_weights.safetensors")
    assert torch.equal(draw(file), want) and not torch.equal(draw(base), want)
    none, half = (load_pipeline(str(miniature), lora=lora, lora_scale=s) for s in (0.0, 0.5))
    torch.testing.assert_close(draw(none), draw(base), rtol=0, atol=1e-4)
    assert not torch.allclose(draw(half), want, atol=1e-3) and not torch.allclose(draw(half), draw(base), atol=1e-3)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (dict(sampler="fast"), "sampler: 'fast' is not one of full, early_stop, hybrid"),
        (dict(sampler="hybrid"), "sampler 'hybrid' needs the noise level t_n"),
        (dict(sampler="early_stop", t_n=1000), "t_n: 1000 is not a timestep of this model, 0 to 999"),
        (dict(sampler="early_stop", t_n=-1), "t_n: -1 is not a timestep"),
        (dict(sampler="hybrid", t_n=990), "t_n: 990 is not below the sampler's first timestep"),
        (dict(sampler="hybrid", t_n=500), "needs a LoRA to switch off, or the base model's UNet"),
    ],
)
def test_impossible_requests_are_named(base, keywords, message):
    scheduler = base.scheduler
    with pytest.raises(ValueError, match=message):
        draw(base, keywords.pop("sampler"), **keywords)
    assert base.scheduler is scheduler


def test_wrong_numbers_and_files_are_named(base, miniature, lora, tmp_path):
    with pytest.raises(ValueError, match="1 generators for 2 prompts"):
        sample(base, PROMPTS[:2], generators=generators(0))
    with pytest.raises(ValueError, match="not both"):
        load_pipeline(str(miniature), lora=lora, unet=tmp_path)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"no weights")
    for keywords in (dict(lora=tmp_path), dict(lora=tmp_path / "gone"), dict(unet=tmp_path), dict(vae=str(tmp_path))):
        with pytest.raises(ModelError) as error:
            load_pipeline(str(miniature), **keywords)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ModelError, match="nowhere"):
        load_pipeline(str(tmp_path / "nowhere"))
