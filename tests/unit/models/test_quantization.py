"""A frozen base in 8 and 4 bits under a LoRA, on bitsandbytes' own CPU kernels."""

import pytest
import torch

from sdxl_ambient.errors import OptionError
from sdxl_ambient.formats.peft import save_lora
from sdxl_ambient.models.denoiser import Conditioning, Denoiser
from sdxl_ambient.models.load import load_unet
from sdxl_ambient.models.lora import add_lora
from sdxl_ambient.models.quantization import quantize, quantized_bytes, quantized_layers
from sdxl_ambient.training.memory import held_bytes

pytest.importorskip("bitsandbytes")
KINDS = ("int8", "nf4")


@pytest.fixture(scope="module")
def batch(unet):
    generator = torch.Generator().manual_seed(0)
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    conditioning = Conditioning(
        torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator),
        torch.randn(2, pooled, generator=generator),
        torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2),
    )
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([500, 900]), conditioning


def output(unet, batch, dtype=torch.float32):
    x_t, t, conditioning = batch
    return Denoiser(unet, conditioning.to("cpu", dtype), dtype)(x_t, t).float()


def distance(a, b) -> float:
    return float(((a - b).square().mean() / b.square().mean()).sqrt())


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_in_fewer_bits_is_near_the_exact_one_and_smaller(miniature, unet, batch, kind):
    held = load_unet(miniature, quantize=kind, device="cpu").eval()
    with torch.no_grad():
        assert 0 < distance(output(held, batch), output(unet, batch)) < {"int8": 0.02, "nf4": 0.12}[kind]
    layers = quantized_layers(unet)
    assert len(layers) > 50 and all(".attentions." in f".{name}." for name in layers)
    saved = sum(layer.weight.nbytes for layer in layers.values()) - (held_bytes([unet]) - held_bytes([held]))
    computed = sum(quantized_bytes(layer.weight, kind) for layer in layers.values())
    # Tables of values are shared on a CPU or not, which at SDXL's size is nothing; here weights are as small as tables.
    tables = 4 * (16 + 256 + 1) * len(layers) if kind == "nf4" else 0
    assert computed - tables <= saved <= computed


@pytest.mark.parametrize(("kind", "precision"), [("int8", torch.float32), ("nf4", torch.bfloat16)])
def test_a_lora_on_it_learns_alone_and_is_like_any_other(miniature, unet, batch, kind, precision, tmp_path):
    """What is saved loads into the stock pipeline, whose base is the exact one."""
    from diffusers import StableDiffusionXLPipeline

    tuned = load_unet(miniature, dtype=precision, quantize=kind, device="cpu")
    add_lora(tuned, rank=4, alpha=8, targets=["attention"])
    tuned.enable_gradient_checkpointing()
    trained = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n and p.dtype == torch.float32 for n, p in trained.items())
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    base = {n: p.detach().clone() for n, p in tuned.named_parameters() if n not in trained}
    losses = []
    for _ in range(6):
        tuned.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = (output(tuned, batch, precision) - batch[0]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        tuned.eval()
        with torch.no_grad():  # a validation in between leaves the base as it is
            shown = output(tuned, batch, precision)
    assert losses[-1] < 0.3 * losses[0]
    assert all(torch.equal(p, base[n]) for n, p in tuned.named_parameters() if n in base)
    save_lora(tuned, tmp_path, {})
    pipeline = StableDiffusionXLPipeline.from_pretrained(miniature)
    pipeline.load_lora_weights(tmp_path)
    with torch.no_grad():
        loaded = output(pipeline.unet, batch)
        start = output(unet, batch)
    assert distance(loaded, shown) < 0.5 * distance(start, shown)


def test_what_a_device_can_not_do_is_one_line(miniature):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(OptionError, match=r"--quantize_base: nf4 can't be computed on cuda: .*; allowed is none") as error:
        quantize(load_unet(miniature), "nf4", "cuda")
    assert "\n" not in str(error.value)
