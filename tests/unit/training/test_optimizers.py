"""Every optimizer by name: learning, stored and resumed bit for bit; and the fused backward pass."""

import copy

import pytest
import torch
from support.optimizers import NAMES, loss_of, needs
from support.running import assert_identical

from sdxl_ambient.errors import OptionError
from sdxl_ambient.models.denoiser import Conditioning
from sdxl_ambient.training.optimizers import FusedBackward, evaluated, make_optimizer, parse_extra
from sdxl_ambient.training.state import load_state, save_state


def small(seed: int = 0):
    """A network with weights on both sides of the 4,096 below which bitsandbytes keeps 32 bits."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, 80), torch.nn.Tanh(), torch.nn.Conv1d(1, 2, 3), torch.nn.Flatten())


def forward(model, seed: int):
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
    hidden = model[1](model[0](x))
    return (model[2](hidden[:, None]).flatten(1).mean(1) - x.mean(1)).square().mean()


def groups_of(model, **second):
    return [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), **second}]


def steps(model, optimizer, start: int, stop: int) -> list[float]:
    losses = []
    for i in range(start, stop):
        loss = forward(model, i)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def made(name, model, **changes):
    lr = {"prodigy": 1.0}.get(name, 1e-2)
    return make_optimizer(name, groups_of(model), **{"lr": lr, "warmup_steps": 2, **changes})


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_learns(name):
    needs(name)
    model = small()
    optimizer = made(name, model)
    before = forward(model, 1000).item()
    steps(model, optimizer, 0, {"prodigy": 300}.get(name, 60))  # it starts with tiny steps
    with evaluated(optimizer):
        assert forward(model, 1000).item() < 0.7 * before


@pytest.mark.parametrize("name", NAMES)
def test_stored_and_resumed_is_uninterrupted_bit_for_bit(name, tmp_path):
    """Through accelerate as the script does it, with one checkpoint that the uninterrupted run doesn't have."""
    needs(name)
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    whole = small()
    optimizer = made(name, whole)
    steps(whole, optimizer, 0, 6)

    first = small()
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(first, made(name, first))
    steps(first, optimizer, 0, 3)
    with evaluated(optimizer):
        save_state(accelerator, tmp_path / "state")
    steps(first, optimizer, 3, 6)  # a checkpoint changes nothing in the run that writes it

    second = small(1)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(second, made(name, second))
    load_state(accelerator, tmp_path / "state")
    steps(second, optimizer, 3, 6)
    assert_identical(whole.state_dict(), first.state_dict())
    assert_identical(whole.state_dict(), second.state_dict())


def test_schedule_free_weights_are_the_averaged_ones_inside_and_the_trained_ones_after():
    needs("adamw_schedulefree")
    model = small()
    optimizer = made("adamw_schedulefree", model)
    steps(model, optimizer, 0, 5)
    trained = copy.deepcopy(model.state_dict())
    with evaluated(optimizer):
        inside = copy.deepcopy(model.state_dict())
        with evaluated(optimizer):
            pass
        assert_identical(inside, model.state_dict())  # the inner one leaves them to the outer one
        with pytest.raises(Exception, match="train mode"):
            optimizer.step()
    assert not torch.equal(inside["0.weight"], trained["0.weight"])
    assert_identical(trained, model.state_dict())
    assert not any("y" in state for state in optimizer.state.values())


def test_groups_have_their_own_learning_rates_but_with_prodigy():
    model = small()
    optimizer = make_optimizer("adamw", groups_of(model, lr=1e-5), lr=1e-4, betas=(0.8, 0.9), weight_decay=0.5, epsilon=1e-6)
    assert [g["lr"] for g in optimizer.param_groups] == [1e-4, 1e-5]
    assert {(g["betas"], g["weight_decay"], g["eps"]) for g in optimizer.param_groups} == {((0.8, 0.9), 0.5, 1e-6)}
    needs("prodigy")
    with pytest.raises(OptionError, match="--text_encoder_lr: 0.5 excludes --optimizer prodigy; allowed is 1, as"):
        make_optimizer("prodigy", groups_of(small(), lr=0.5), lr=1.0)


def test_arguments_reach_the_optimizer():
    extra = parse_extra(["amsgrad=true", "foreach=None"])
    assert extra == {"amsgrad": True, "foreach": None}
    assert made("adamw", small(), extra=extra).param_groups[0]["amsgrad"] is True
    adafactor = made("adafactor", small(), extra=parse_extra(["eps=(1e-20, 1e-2)", "beta1=0.9"])).param_groups[0]
    assert adafactor["eps"] == (1e-20, 1e-2) and adafactor["beta1"] == 0.9 and not adafactor["scale_parameter"]
    assert parse_extra(["x=__import__('os')"]) == {"x": "__import__('os')"}  # a word, never run


@pytest.mark.parametrize(
    ("name", "pairs", "message"),
    [
        ("adamw", ["d_coef=2"], "--optimizer_args: adamw has no 'd_coef'; allowed are amsgrad, foreach, fused, maximize"),
        ("adamw", ["lr=2"], "--optimizer_args: lr is given by --learning_rate"),
        ("adamw", ["betas=(0.1, 0.2)"], "--optimizer_args: betas is given by --adam_beta1 and --adam_beta2"),
        ("adafactor", ["warmup_steps=2"], "adafactor has no 'warmup_steps'; allowed are beta1, clip_threshold, decay_rate"),
        ("adamw", ["amsgrad=1", "amsgrad=0"], "--optimizer_args: amsgrad is given twice"),
        ("adamw", ["amsgrad"], "--optimizer_args: 'amsgrad' is not of the form name=value"),
        ("adamw", ["foreach=true", "fused=true"], "--optimizer_args: foreach=True fused=True: adamw refuses it: "),
        ("prodigy", ["d0=-1"], "--optimizer_args: d0=-1: prodigy refuses it: Invalid d0 value"),
    ],
)
def test_wrong_arguments_are_one_line(name, pairs, message):
    needs(name)
    with pytest.raises(OptionError) as error:
        made(name, small(), extra=parse_extra(pairs))
    assert message in str(error.value) and "\n" not in str(error.value)


# -- fused backward pass --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch(unet):
    generator = torch.Generator().manual_seed(0)
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    conditioning = Conditioning(
        torch.randn(1, 77, unet.config.cross_attention_dim, generator=generator),
        torch.randn(1, pooled, generator=generator),
        torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
    )
    return torch.randn(1, 4, 16, 16, generator=generator), torch.tensor([700]), conditioning


def maker(name):
    return lambda groups: make_optimizer(name, groups, lr=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fused_is_the_usual_step_bit_for_bit_and_holds_one_gradient(unet, batch, checkpointing):
    usual, fused = (copy.deepcopy(unet).requires_grad_(True).train() for _ in range(2))
    optimizer = make_optimizer("adamw", [{"params": list(usual.parameters())}], lr=1e-3)
    held = []
    for p in fused.parameters():  # before the step of that weight: hooks run in the order they were added
        p.register_post_accumulate_grad_hook(lambda p: held.append(sum(q.grad is not None for q in fused.parameters())))
    one = FusedBackward(maker("adamw"), [{"params": list(fused.parameters())}])
    if checkpointing:
        fused.enable_gradient_checkpointing()
        usual.enable_gradient_checkpointing()
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step) for o in (optimizer, one)]
    for _ in range(3):
        for model, o in ((usual, optimizer), (fused, one)):
            loss_of(model, batch).backward()
            o.step()
            o.zero_grad()
        for s in schedulers:
            s.step()
    assert_identical(usual.state_dict(), fused.state_dict())
    assert len(held) == 3 * len(list(fused.parameters())) and set(held) == {1}
    assert one.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 1e-3 / 8
    assert_identical(
        one.state_dict()["state"], optimizer.state_dict()["state"]
    )  # either goes on from the other's checkpoint


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor"])
def test_fused_goes_through_accelerate_and_a_checkpoint(name, precision, tmp_path):
    needs(name)
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def run(seed, start, stop, load=None, save=None):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        model = torch.nn.Sequential(torch.nn.Linear(64, 80), torch.nn.Linear(80, 1))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) * 0.1)
        prepared, optimizer = accelerator.prepare(model, FusedBackward(maker(name), [{"params": list(model.parameters())}]))
        if load:
            load_state(accelerator, load)
        for i in range(start, stop):
            with accelerator.accumulate(prepared):
                x = torch.randn(8, 64, generator=torch.Generator().manual_seed(i))
                accelerator.backward((prepared(x) - x.mean(1, keepdim=True)).square().mean())
                optimizer.step()
                optimizer.zero_grad()
        if save:
            save_state(accelerator, save)
        return model.state_dict()

    whole = run(0, 0, 5)
    run(0, 0, 2, save=tmp_path / "state")
    assert_identical(whole, run(1, 2, 5, load=tmp_path / "state"))
    assert not torch.equal(whole["0.weight"], run(0, 0, 2)["0.weight"])
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_gradient_that_is_not_finite_leaves_its_weight_and_is_named():
    model = small()
    names = {p: n for n, p in model.named_parameters()}
    FusedBackward(maker("adamw"), groups_of(model), names)
    before = copy.deepcopy(model.state_dict())
    model[0].weight.register_hook(lambda g: g * float("nan"))
    with pytest.raises(FloatingPointError, match="the gradient of 0.weight is not finite"):
        forward(model, 0).backward()
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[2].weight, before["2.weight"])  # its gradient came earlier
