"""Averaged weights in the device's and in the processor's memory."""

import copy

import pytest
import torch

from sdxl_ambient.training.ema import EMA


def trained(seed: int, items, average, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with torch.no_grad():
            for p in average.parameters:
                p.add_(torch.randn(p.shape, generator=generator) * 1e-2)
        average.update()


@pytest.fixture
def modules(unet):
    """A trained UNet, and beside it a module of which one weight is frozen."""
    torch.manual_seed(0)
    return copy.deepcopy(unet).requires_grad_(True).train(), torch.nn.Linear(3, 2).requires_grad_(True)


def test_offloaded_is_the_same_bit_for_bit(modules):
    found = []
    for offload in (False, True):
        items = copy.deepcopy(modules)
        average = EMA(list(items), decay=0.5, offload=offload)
        trained(0, items, average)
        before = [p.detach().clone() for p in average.parameters]
        storages = [p.data_ptr() for p in average.parameters]
        with average.weights():
            assert not any(i.training for i in items)
            found.append([p.detach().clone() for p in average.parameters])
            assert not all(torch.equal(p, b) for p, b in zip(average.parameters, before, strict=True))
            # Copied into the same memory: the device never holds a second set.
            assert not offload or storages == [p.data_ptr() for p in average.parameters]
        assert all(i.training for i in items)
        assert all(torch.equal(p, b) for p, b in zip(average.parameters, before, strict=True))
        found[-1] += average.ema.shadow_params
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("loaded_offloaded", [False, True])
def test_a_stored_average_goes_on_bit_for_bit(modules, tmp_path, offload, loaded_offloaded):
    """Kept on the device or not may change on resume."""
    (_, linear) = modules
    average = EMA(linear, decay=0.9, offload=offload)
    trained(0, linear, average)
    torch.save(average.state_dict(), tmp_path / "average")
    other = copy.deepcopy(linear)
    resumed = EMA(other, decay=0.9, offload=loaded_offloaded)
    resumed.load_state_dict(torch.load(tmp_path / "average", weights_only=True))
    for one, items in ((average, linear), (resumed, other)):
        trained(1, items, one)
    assert resumed.ema.optimization_step == 6
    assert all(torch.equal(a, b) for a, b in zip(average.ema.shadow_params, resumed.ema.shadow_params, strict=True))


@pytest.mark.parametrize("offload", [False, True])
def test_parameters_may_stand_among_modules_and_frozen_ones_are_left_out(modules, offload):
    unet, linear = modules
    alone, frozen = torch.nn.Parameter(torch.ones(2)), linear.bias.requires_grad_(False)
    average = EMA([linear, alone, alone], decay=0.5, offload=offload)
    assert [id(p) for p in average.parameters] == [id(linear.weight), id(alone)]
    held = frozen.clone()
    trained(0, None, average)
    with average.weights():
        assert torch.equal(frozen, held)
    shadow = average.ema.shadow_params[0]
    torch.testing.assert_close(average(torch.ones(1, 3)), torch.ones(1, 3) @ shadow.T + frozen)


def test_no_swap_is_left_behind_by_an_error(modules):
    _, linear = modules
    average = EMA(linear, decay=0.5, offload=True)
    trained(0, linear, average)
    before = linear.weight.detach().clone()
    with pytest.raises(RuntimeError, match="stop"), average.weights():
        raise RuntimeError("stop")
    assert torch.equal(linear.weight, before) and linear.training
