"""How a LoRA starts, what is saved of one that changed its base, and the text encoders'."""

import copy

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from support.tuned import unet_inputs

from sdxl_ambient.config.settings import settings_of
from sdxl_ambient.config.training import TrainOptions
from sdxl_ambient.errors import CheckpointError, ModelError
from sdxl_ambient.formats.peft import load_lora_state, lora_state, save_lora
from sdxl_ambient.formats.record import lora_metadata
from sdxl_ambient.models.conditioning import encode_prompts, encode_tokens, tokenize
from sdxl_ambient.models.denoiser import Denoiser
from sdxl_ambient.models.load import load_unet
from sdxl_ambient.models.lora import (
    INITS,
    LORA_TARGETS,
    add_lora,
    add_text_lora,
    changes_base,
    lora_targets,
    rebase,
)
from sdxl_ambient.training.checkpoint import register_lora_hooks, save_checkpoint
from sdxl_ambient.training.record import lora_record
from sdxl_ambient.training.state import load_state
from sdxl_ambient.training.weights import WeightSettings

INFO = {"t_n": 500, "low_noise": "skip"}
CAPTIONS = ["penguin", "a red apple on a table", ""]
WAYS = [("pissa", False), ("pissa", True), ("olora", False), ("olora", True)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads wait for each other longer than such small layers take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def inputs(unet):
    return unet_inputs(unet)


@torch.no_grad()
def output(unet, inputs):
    return Denoiser(unet.eval(), inputs[2])(*inputs[:2])


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def with_lora(unet, **keywords):
    tuned = copy.deepcopy(unet)
    add_lora(tuned, **{"rank": 4, "alpha": 6, "targets": ["attention"], **keywords})
    return tuned


def as_if_trained(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return model


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def stock(miniature, folder):
    pipe = StableDiffusionXLPipeline.from_pretrained(miniature, add_watermarker=False)
    pipe.load_lora_weights(folder)
    return pipe


# -- how it starts ----------------------------------------------------------------------------------------------


def test_presets_hold_each_other():
    attention, ff, linear, everything = (set(lora_targets([p])) for p in ("attention", "attention_ff", "linear", "all"))
    assert attention < ff < linear < everything
    assert ff - attention == {"ff.net.0.proj", "ff.net.2"}


@pytest.mark.parametrize("init", INITS)
def test_every_start_is_the_base(unet, inputs, init):
    tuned = with_lora(unet, targets=["linear"], init=init, use_rslora=True)
    close(output(tuned, inputs), output(unet, inputs))
    trained = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    assert all("lora" in n and p.dtype == torch.float32 for n, p in trained.items())
    assert {x.scaling["default"] for x in layers(tuned).values()} == {3.0}
    zero = [n for n, p in trained.items() if not p.any()]
    assert all("lora_B" in n for n in zero) if init in ("gaussian", "kaiming") else not zero
    assert changes_base(tuned) == (init in ("pissa", "olora"))


@pytest.mark.parametrize("init", ["orthogonal", "pissa", "olora"])
def test_a_half_precision_base_rounds_no_factor(miniature, init):
    half = load_unet(miniature, dtype=torch.bfloat16)
    before = {n: p.detach().clone() for n, p in half.named_parameters()}
    add_lora(half, rank=4, alpha=6, targets=["attention"], init=init)
    for name, layer in layers(half).items():
        base, was = layer.base_layer.weight, before[f"{name}.weight"].float()
        assert base.dtype == torch.bfloat16
        added = 1.5 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        # Off by what the rounding of what is left may cost, and no more.
        assert ((base.float() + added - was).abs() <= 2**-8 * base.float().abs() + 1e-6).all(), name
        assert init != "orthogonal" or added.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (dict(init="pissa", targets=["to_q", "conv1"]), "'pissa' needs linear targets, and .*conv1 is a Conv2d"),
        (dict(init="olora", targets=["all"]), "--init_lora_weights: 'olora' needs linear targets"),
        (dict(init="orthogonal", targets=["conv_in"]), "conv_in is a Conv2d; allowed with it are gaussian, kaiming"),
        (dict(init="orthogonal", rank=3), "--rank: 3 is odd"),
        (dict(init="pissa", rank=999), "--rank: 999 is more than --init_lora_weights pissa finds in down_blocks"),
        (dict(init="olora", use_dora=True), "'olora' excludes --use_dora"),
        (dict(init="normal"), "--init_lora_weights: 'normal' is not one of gaussian"),
        (dict(targets=["norm1"]), "--lora_targets: Target module GroupNorm.* is not supported"),
    ],
)
def test_a_start_that_does_not_fit_is_one_line(unet, keywords, message):
    with pytest.raises(ModelError, match=message) as error:
        with_lora(unet, **keywords)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_convolutions_start_too(unet, inputs, init):
    tuned = with_lora(unet, targets=["all"], init=init)
    assert {type(x.base_layer).__name__ for x in layers(tuned).values()} == {"Linear", "Conv2d"}
    close(output(tuned, inputs), output(unet, inputs))


def weights(**changes):
    return settings_of(WeightSettings, TrainOptions(**{"rank": 4, **changes}))


def test_what_a_resume_must_agree_in():
    assert lora_record(weights()) == lora_record(weights(lora_alpha=4, lora_targets=LORA_TARGETS["attention"][::-1]))
    others = [dict(rank=8, lora_alpha=4), dict(lora_alpha=8), dict(lora_targets=["linear"]), dict(lora_dropout=0.1)]
    others += [dict(use_dora=True), dict(use_rslora=True), dict(init_lora_weights="pissa"), dict(train_text_encoder=True)]
    for other in others:
        assert lora_record(weights(**other)) != lora_record(weights()), other
    assert lora_record(weights(finetune="full")) == {}
    assert lora_record(weights(lora="x.safetensors")) == {"lora_dropout": 0.0, "train_text_encoder": False}


# -- a base that has lost a part to the LoRA --------------------------------------------------------------------


@pytest.mark.parametrize(("init", "use_rslora"), WAYS)
def test_what_is_saved_acts_on_the_base_as_it_was(unet, miniature, tmp_path, inputs, init, use_rslora):
    tuned = as_if_trained(with_lora(unet, targets=["attention_ff"], init=init, use_rslora=use_rslora))
    assert any(not torch.equal(x.base_layer.weight, dict(unet.named_modules())[n].weight) for n, x in layers(tuned).items())
    path = save_lora(tuned, tmp_path, INFO)
    want = output(tuned, inputs)
    close(output(stock(miniature, tmp_path).unet, inputs), want)
    assert (want - output(unet, inputs)).abs().max() > 1e-2
    described = lora_metadata(path)
    assert described["unet.r"] == 8 and described["unet.init_lora_weights"] is True


@pytest.mark.parametrize(("init", "use_rslora"), WAYS)
def test_a_resume_is_exact(unet, tmp_path, inputs, init, use_rslora):
    """Through accelerate, with another random state in front of the second start."""

    def start():
        accelerator = Accelerator(cpu=True)
        tuned = with_lora(unet, init=init, use_rslora=use_rslora)
        trained = [p for p in tuned.parameters() if p.requires_grad]
        prepared, optimizer = accelerator.prepare(tuned, torch.optim.AdamW(trained, lr=1e-2))
        register_lora_hooks(accelerator, accelerator.unwrap_model(prepared))
        return accelerator, tuned, optimizer

    def train(tuned, optimizer):
        Denoiser(tuned, inputs[2])(*inputs[:2]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    accelerator, tuned, optimizer = start()
    train(tuned, optimizer)
    state = save_checkpoint(accelerator, tmp_path, 1, {})
    train(tuned, optimizer)
    torch.randn(3)
    accelerator, again, optimizer = start()
    load_state(accelerator, state)
    train(again, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(tuned.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(tuned.lora_initial[n], w) for n, w in again.lora_initial.items())
    assert list(again.peft_config) == ["default"]


def test_a_start_with_other_factors_takes_those_of_the_state(unet, tmp_path, inputs):
    """As on another machine, whose decomposition has other signs or last digits."""
    tuned = as_if_trained(with_lora(unet, init="pissa"))
    path = save_lora(tuned, tmp_path, INFO)
    other = with_lora(unet, init="olora")
    assert rebase(copy.deepcopy(other), other.lora_initial) == 0
    load_lora_state(other, path)
    close(output(other, inputs), output(tuned, inputs))
    for name, weight in lora_state(tuned).items():
        assert torch.equal(lora_state(other)[name], weight)
        assert torch.equal(other.lora_initial[name], tuned.lora_initial[name])
    close(other.state_dict()["conv_in.weight"], tuned.state_dict()["conv_in.weight"])


def test_a_lora_of_the_base_is_not_one_of_what_is_left(unet, tmp_path):
    plain, pissa = (save_lora(with_lora(unet, init=i), tmp_path / i, INFO) for i in ("gaussian", "pissa"))
    for init, path in (("gaussian", pissa), ("pissa", plain)):
        with pytest.raises(CheckpointError, match=r"another shape: unet\..* is \(\d+, \d+\) instead of"):
            load_lora_state(with_lora(unet, init=init), path)


# -- text encoders ----------------------------------------------------------------------------------------------


@pytest.fixture
def text(encoders):
    return [copy.deepcopy(e) for e in encoders.text_encoders]


def test_tokens_give_what_captions_give(encoders, text):
    tokens = tokenize(CAPTIONS, encoders.tokenizers)
    assert tokens.shape == (3, 2, 77) and tokens.dtype == torch.int64
    want = encode_prompts(CAPTIONS, encoders.tokenizers, encoders.text_encoders)
    got = encode_tokens(tokens, text)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    add_text_lora(text, rank=4, alpha=4, targets=["linear"])
    for a, b in zip(encode_tokens(tokens, text), want, strict=True):
        assert torch.equal(a, b) and a.requires_grad and not b.requires_grad


def test_dropped_captions_are_shown_as_the_base_has_them(encoders, text):
    add_text_lora(text, rank=4, alpha=4)
    [as_if_trained(e) for e in text]
    tokens, dropped = tokenize(CAPTIONS, encoders.tokenizers), torch.tensor([False, False, True])
    want = encode_tokens(tokens, text)
    for a, b, c in zip(
        encode_tokens(tokens, text, dropped, zero_empty=True), want, encode_tokens(tokens, text, dropped), strict=True
    ):
        assert torch.equal(a[:2], b[:2]) and not a[2].any() and b[2].any()
        assert torch.equal(b, c)
    # Nothing but dropped captions: a gradient of zero for every weight, which other processes wait for.
    embeds, pooled = encode_tokens(tokens, text, torch.ones(3, dtype=torch.bool), zero_empty=True)
    (embeds.sum() + pooled.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for e in text for p in e.parameters() if p.requires_grad)


@pytest.mark.parametrize("targets", [["attention"], ["attention_ff"]])
def test_every_weight_of_the_text_encoders_lora_is_trained(encoders, text, targets):
    add_text_lora(text, rank=4, alpha=4, targets=targets, init="orthogonal")
    embeds, pooled = encode_tokens(tokenize(CAPTIONS, encoders.tokenizers), text)
    (embeds.square().sum() + pooled.square().sum()).backward()
    for encoder, count in zip(text, (1, 2), strict=True):
        trained = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
        assert all("lora_" in n and p.dtype == torch.float32 and p.grad.any() for n, p in trained.items())
        # The first encoder's last layer is not read.
        assert len(trained) == 2 * count * (4 if targets == ["attention"] else 6)


def test_checkpointing_the_text_encoders_changes_no_gradient(encoders, text):
    add_text_lora(text, rank=4, alpha=4, targets=["all"], init="orthogonal")
    gradients = []
    for checkpointing in (False, True):
        for encoder in text:
            encoder.train()
            encoder.zero_grad()
            if checkpointing:
                encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        embeds, pooled = encode_tokens(tokenize(CAPTIONS, encoders.tokenizers), text)
        (embeds.square().sum() + pooled.square().sum()).backward()
        gradients.append([p.grad.clone() for e in text for p in e.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@torch.no_grad()
def prompts(pipe):
    return pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)[::2]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "how", [dict(), dict(targets=["linear"], use_rslora=True), dict(init="pissa"), dict(use_dora=True)], ids=str
)
def test_all_parts_are_one_file_that_the_stock_pipeline_loads(unet, encoders, text, miniature, tmp_path, inputs, how):
    tuned = as_if_trained(with_lora(unet, **how))
    # Another rank and strength than the UNet's.
    add_text_lora(text, rank=2, alpha=5, **how)
    [as_if_trained(e, seed) for seed, e in enumerate(text, 1)]
    path = save_lora(tuned, tmp_path, INFO, text)
    assert {n.split(".")[0] for n in load_file(path)} == {"unet", "text_encoder", "text_encoder_2"}
    described = lora_metadata(path)
    assert described["text_encoder.r"] == described["text_encoder_2.r"] == 2
    assert described["text_encoder.lora_alpha"] == 5 and described["text_encoder.base_model_name_or_path"] is None
    pipe = stock(miniature, tmp_path)
    want = encode_prompts(CAPTIONS, encoders.tokenizers, text)
    for a, b, c in zip(
        prompts(pipe), want, encode_prompts(CAPTIONS, encoders.tokenizers, encoders.text_encoders), strict=True
    ):
        close(a, b)
        assert (b - c).abs().max() > 1e-2
    close(output(pipe.unet, inputs), output(tuned, inputs))


def test_a_resume_restores_both_text_encoders(unet, encoders, text, tmp_path, inputs):
    accelerator = Accelerator(cpu=True)
    add_text_lora(text, rank=2, alpha=5)
    models = [as_if_trained(m, seed) for seed, m in enumerate([with_lora(unet), *text])]
    accelerator.prepare(*models)
    register_lora_hooks(accelerator, models[0], models[1:])
    state = save_checkpoint(accelerator, tmp_path, 1, {}, info=INFO)
    names = {p.name for p in state.glob("*.safetensors")}
    assert names == {"pytorch_lora_weights.safetensors", "random_state_0.safetensors"}
    want = [lora_state(m) for m in models]
    for m in models:
        as_if_trained(m, 9)
    load_state(accelerator, state)
    for m, weights in zip(models, want, strict=True):
        assert list(m.peft_config) == ["default"]
        assert all(torch.equal(w, weights[n]) for n, w in lora_state(m).items())
        assert all(p.requires_grad == ("lora_" in n) for n, p in m.named_parameters())


def test_a_state_with_other_parts_is_refused(unet, text, tmp_path):
    tuned = with_lora(unet)
    alone = save_lora(tuned, tmp_path / "alone", INFO)
    add_text_lora(text, rank=2, alpha=5)
    whole = save_lora(tuned, tmp_path / "whole", INFO, text)
    for path, encoders, message in ((alone, text, "[1-9]+ weights missing, 0"), (whole, None, "0 weights missing, [1-9]+")):
        with pytest.raises(CheckpointError, match=f"another LoRA: {message}"):
            load_lora_state(tuned, path, encoders)
