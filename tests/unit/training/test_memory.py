"""The memory estimate against what real tensors take, and its table against the committed result."""

import copy
import json

import pytest
import torch
from support.optimizers import NAMES, loss_of, needs
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.memory import GIB, RESULT, SETTINGS, setting, to_fake, written
from benchmarks.record import ROOT
from sdxl_ambient.models.denoiser import Conditioning
from sdxl_ambient.models.lora import add_lora
from sdxl_ambient.training.memory import Activations, Storages, activation_bytes, estimate, held_bytes, state_bytes
from sdxl_ambient.training.optimizers import make_optimizer


@pytest.fixture(scope="module")
def batch(unet):
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    conditioning = Conditioning(
        torch.randn(1, 77, unet.config.cross_attention_dim), torch.randn(1, pooled), torch.full((1, 6), 64.0)
    )
    return torch.randn(1, 4, 16, 16), torch.tensor([700]), conditioning


@pytest.fixture(params=["lora", "full"])
def model(request, unet):
    model = copy.deepcopy(unet).train()
    if request.param == "full":
        return model.requires_grad_(True)
    add_lora(model, rank=4, alpha=4, targets=["attention"])
    return model


def really_kept(forward, model) -> tuple[int, object]:
    """Bytes that autograd keeps and holds, beside the model's weights, by the addresses of real memory; and the loss."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    return sum(kept.values()), loss


def test_memory_is_counted_once_and_not_held():
    x = torch.zeros(4, 100)
    storages = Storages([x, x[1:], x.T, x.view(-1)])
    assert storages.bytes == 1600 and x[2] in storages and x.clone() not in storages
    for _ in range(50):  # what is gone may have given its address to another
        storages.add(torch.zeros(4, 100))
    assert storages.bytes == 51 * 1600


@pytest.mark.parametrize("autocast", [False, True])
def test_counted_activations_are_those_of_real_tensors(model, batch, autocast):
    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return loss_of(model, batch)

    counted = activation_bytes(forward, [model])
    kept, _ = really_kept(forward, model)
    assert counted == kept > 1e6


def test_counted_activations_with_checkpointing(model, batch):
    def forward():
        return loss_of(model, batch)

    whole = activation_bytes(forward, [model])
    model.enable_gradient_checkpointing()
    checkpoint = model.down_blocks[0]._gradient_checkpointing_func
    counted = activation_bytes(forward, [model])
    assert model.down_blocks[0]._gradient_checkpointing_func is checkpoint
    kept, loss = really_kept(forward, model)
    assert kept < counted < whole
    loss.backward()  # a count leaves nothing behind that training would stumble over
    with Activations([model]).counting():
        loss = forward()
    with pytest.raises(RuntimeError, match="counted only"):
        loss.backward()


def test_fake_tensors_count_like_real_ones(unet, batch):
    found = []
    for checkpointing in (False, True):
        model, fake = (copy.deepcopy(unet).requires_grad_(True).train() for _ in range(2))
        if checkpointing:
            model.enable_gradient_checkpointing()
            fake.enable_gradient_checkpointing()
        found.append(estimate(model, forward=lambda m=model: loss_of(m, batch)))
        with FakeTensorMode():
            to_fake(fake)
            x, _, shown = batch
            shown = Conditioning(*(torch.empty(v.shape) for v in (shown.prompt_embeds, shown.pooled, shown.time_ids)))
            imagined = (torch.empty(x.shape), torch.zeros(1, dtype=torch.long), shown)
            assert estimate(fake, forward=lambda m=fake, b=imagined: loss_of(m, b)) == found[-1]
    assert found[1]["activations"] < found[0]["activations"]


@pytest.mark.parametrize("name", NAMES)
def test_states_are_as_large_as_the_optimizers_own(name, unet, batch):
    needs(name)
    model = copy.deepcopy(unet).requires_grad_(True).train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1e-3)  # nothing is zero, as a whole
    optimizer = make_optimizer(name, [{"params": list(model.parameters())}], lr=1.0 if name == "prodigy" else 1e-4)
    loss_of(model, batch).backward()
    optimizer.step()
    real = Storages(
        value
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and key != "step"
    )
    found = estimate(model, optimizer=name)
    assert found["optimizer"] == real.bytes
    assert found["gradients"] == sum(p.grad.nbytes for p in model.parameters()) == found["weights"] == held_bytes([model])


def test_the_parts_of_the_total():
    module = torch.nn.Sequential(torch.nn.Linear(100, 50, bias=False), torch.nn.Linear(50, 1, bias=False))
    module[1].requires_grad_(False)
    usual = estimate(module)
    assert usual["weights"] == 20_200 and usual["gradients"] == 20_000 and usual["optimizer"] == 40_000
    assert usual["step"] == 20_000 and usual["total"] == 100_200 and usual["processor"] == usual["averages"] == 0
    averaged = estimate(module, use_ema=True)
    assert averaged["averages"] == 20_000 and averaged["total"] == 120_200
    offloaded = estimate(module, use_ema=True, offload_ema=True)
    assert offloaded["processor"] == 20_000 and offloaded["total"] == usual["total"]
    x = torch.ones(10, 100)
    fused = estimate(
        module.requires_grad_(True), optimizer="adafactor", fused_backward_pass=True, forward=lambda: module(x).sum()
    )
    assert fused["gradients"] == 20_000 and fused["step"] == 60_000
    assert fused["optimizer"] == 4 * (150 + 51) + 2 * 4
    assert fused["activations"] == 10 * 100 * 4 + 10 * 50 * 4  # the input of either layer
    assert fused["total"] == sum(fused[n] for n in ("weights", "gradients", "optimizer", "activations", "step"))
    assert state_bytes("adamw8bit", torch.empty(64, 64)) == 2 * 4096 + 2 * 4 * 16


def test_the_committed_figures_are_the_computed_ones():
    """The cheapest of them anew: the configuration, or what is counted, has not changed since."""
    figures = json.loads(RESULT.read_text())["figures"]["settings"]["full_fused"]["1"]
    found = setting(SETTINGS["full_fused"], 1)
    for name in ("weights", "gradients", "optimizer", "total"):
        assert found[name] / GIB == pytest.approx(figures[name], rel=1e-6)


def test_the_table_is_that_of_the_committed_result():
    text = (ROOT / "docs/MEMORY.md").read_text()
    record = json.loads(RESULT.read_text())
    assert written(text, record) == text, "run python -m benchmarks.memory --table docs/MEMORY.md"
    with pytest.raises(ValueError, match="once"):
        written("no marks", record)
