"""Which devices an option may name, and one network at a time on the device."""

import pytest
import torch

from sdxl_ambient.devices import DTYPES, Placement, check_device, resolve_device
from sdxl_ambient.errors import OptionError


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_a_device_that_every_machine_has_is_taken(device):
    check_device(device)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("mps", "'mps' is not one of auto, cpu, cuda, cuda:N"),
        ("meta", "'meta' is not one of auto, cpu, cuda, cuda:N"),
        ("gpu", "'gpu' is not one of auto, cpu, cuda, cuda:N"),
        ("cuda", "'cuda' is not there; this machine has 0 CUDA GPUs"),
        ("cuda:7", "'cuda:7' is not there; this machine has 0 CUDA GPUs"),
    ],
)
def test_another_device_is_refused_in_one_line(monkeypatch, device, message):
    # A driver that torch can't use may count GPUs all the same.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(OptionError, match=f"^--device: {message}$"):
        check_device(device)


def test_gpus_are_counted_from_zero(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cuda", "cuda:0", "cuda:1"):
        check_device(device)
    with pytest.raises(OptionError, match="'cuda:2' is not there; this machine has 2 CUDA GPUs"):
        check_device("cuda:2")
    assert resolve_device("auto") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu") and resolve_device("cuda:1") == torch.device("cuda:1")


def test_one_network_at_a_time_has_a_place():
    first, second, place = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), Placement(torch.device("cpu"))
    assert place.use(first) is first is place.there
    assert place.use(second) is second is place.there
    place.clear()
    assert place.there is None
    assert DTYPES == {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
