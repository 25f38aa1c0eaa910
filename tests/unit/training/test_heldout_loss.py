"""Losses on held-out images at fixed times and noise, the denoising gap, and when they say that training should stop."""

import copy

import pytest
import torch
from accelerate import Accelerator
from support.pictures import copy_emoji

from sdxl_ambient.models.denoiser import Denoiser
from sdxl_ambient.spread import spread
from sdxl_ambient.store.reader import LatentStore
from sdxl_ambient.training.heldout_loss import (
    BandSettings,
    EarlyStopping,
    Losses,
    band_edges,
    band_losses,
    compare,
    gap,
    scalars,
)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory, encoders, schedule):
    from sdxl_ambient.images.geometry import Geometry
    from sdxl_ambient.store.build import build_store
    from sdxl_ambient.store.settings import StoreSettings

    folder = tmp_path_factory.mktemp("heldout")
    build_store(
        copy_emoji(folder / "emoji", 6),
        folder / "store",
        encoders,
        schedule,
        StoreSettings(Geometry(64)),
        log=lambda m: None,
    )
    return LatentStore(folder / "store")


def shown(batch):
    return batch.conditioning.to("cpu", torch.float32)


class Zero(torch.nn.Module):
    """Says that there is no noise, and notes what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x_t, t, **_):
        assert not self.training and not torch.is_grad_enabled()
        self.asked.append((x_t, t))
        return (torch.zeros_like(x_t),)


def losses(accelerator, unet, schedule, store, batch_size, bands=4, **more):
    settings = BandSettings(bands, batch_size, **more)

    def denoiser(batch):
        return Denoiser(unet, shown(batch))

    return band_losses(accelerator, unet, denoiser, schedule, store, list(range(len(store))), settings)


@pytest.mark.parametrize(("t_n", "bands"), [(500, 4), (-1, 4), (997, 4), (500, 1), (300, 7)])
def test_bands_are_the_times_above_t_n_in_equal_parts(schedule, t_n, bands):
    edges = band_edges(schedule, t_n, bands)
    assert len(edges) == bands and edges[0][0] == t_n + 1 and edges[-1][1] == 999
    assert all(a <= b for a, b in edges)
    if bands <= 999 - t_n:
        sizes = [b - a + 1 for a, b in edges]
        assert max(sizes) - min(sizes) <= 1 and sum(sizes) == 999 - t_n


def test_every_picture_is_denoised_once_in_each_band(accelerator, schedule, store):
    unet = Zero().train()
    found = losses(accelerator, unet, schedule, store, 4)
    times = torch.cat([t for _, t in unet.asked])
    # Six pictures in batches of four: the last is filled up, for other processes' sake.
    assert found.shape == (6, 4) and len(times) == 4 * 8 and unet.training
    for first, last in band_edges(schedule, 500, 4):
        assert int(((times >= first) & (times <= last)).sum()) == 8
    # A network that finds no noise has the noise's own mean square for its loss, whatever the level.
    assert float(found.mean()) == pytest.approx(1.0, abs=0.1)


def test_losses_are_the_same_at_each_call_and_for_each_batch_size(accelerator, schedule, store, unet):
    a, b = (losses(accelerator, unet, schedule, store, size) for size in (4, 4))
    assert torch.equal(a, b)
    torch.testing.assert_close(losses(accelerator, unet, schedule, store, 3), a, atol=1e-6, rtol=1e-5)


def test_x_n_space_scales_each_loss(accelerator, schedule, store):
    one = losses(accelerator, Zero(), schedule, store, 6, bands=1)
    unet = Zero()
    other = losses(accelerator, unet, schedule, store, 6, bands=1, loss_space="x_n")
    t = torch.cat([t for _, t in unet.asked])
    r, nu = schedule.transition(torch.full_like(t, 500), t)
    torch.testing.assert_close(other[:, 0], one[:, 0] * (nu / r).double().square(), atol=1e-6, rtol=1e-5)


def test_a_network_that_learnt_one_set_has_a_gap(accelerator, schedule, store, unet):
    """Trained on two of six pictures, for their fixed noise, it knows those two better."""
    tuned = copy.deepcopy(unet).train().requires_grad_(True)
    optimizer = torch.optim.Adam(tuned.parameters(), lr=1e-3)
    from sdxl_ambient.objective import ambient_objective
    from sdxl_ambient.store.batches import collate

    batch = collate([store[i, i] for i in range(2)])
    denoise = Denoiser(tuned, shown(batch))
    for step in range(30):
        generator = torch.Generator().manual_seed(step)
        ambient_objective(denoise, schedule, batch.x_n, batch.t_n, generator).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    before, after = (losses(accelerator, u, schedule, store, 6) for u in (unet, tuned))
    found = gap(Losses(after[2:], after[:2]), Losses(before[2:], before[:2]))
    assert found["value"] > 0.02


def test_the_gap_is_the_difference_of_the_mean_changes():
    start = Losses(torch.tensor([[1.0], [3.0]]).double(), torch.tensor([[2.0], [6.0]]).double())
    now = Losses(torch.tensor([[0.9], [3.1]]).double(), torch.tensor([[1.5], [5.3]]).double())
    # Held-out changes −.1 and .1, mean 0, variance .02; training changes −.5 and −.7, mean −.6, variance .02.
    assert gap(now, start) == pytest.approx({"value": 0.6 / 2.0, "standard_error": (0.01 + 0.01) ** 0.5 / 2.0})
    assert gap(start, start) == {"value": 0.0, "standard_error": 0.0}


def test_a_record_has_every_band_and_goes_into_a_tracker():
    start = Losses(torch.ones(4, 2).double(), torch.ones(4, 2).double())
    now = Losses(torch.full((4, 2), 0.9).double(), torch.tensor([[0.9, 0.8]] * 4).double())
    record = compare(7, now, start, [(501, 750), (751, 999)])
    assert [b["band"] for b in record["bands"]] == ["501-750", "751-999"]
    flat = scalars(record)
    assert flat["heldout_loss"] == pytest.approx(0.9) and flat["denoising_gap/501-750"] == pytest.approx(0, abs=1e-12)
    assert flat["denoising_gap/751-999"] == pytest.approx(0.1 / 0.9)
    assert compare(7, now, start, None)["bands"][0]["band"] == "band 1"


def record(step, heldout, value=0.0, error=0.0):
    return {"step": step, "heldout": heldout, "gap": {"value": value, "standard_error": error}}


def test_patience_counts_validations_without_a_lower_loss():
    stopping = EarlyStopping(patience=2)
    assert stopping.reason is None
    assert [stopping.add(record(k, loss)) for k, loss in enumerate([3.0, 2.0, 2.5])] == [True, True, False]
    assert stopping.reason is None and stopping.best["step"] == 1
    stopping.add(record(3, 2.0))
    assert stopping.reason == "the held-out loss has not fallen for 2 validations (lowest 2.0000 at step 1)"


def test_a_gap_stops_only_beyond_its_uncertainty():
    stopping = EarlyStopping(max_gap=0.05)
    stopping.add(record(1, 1.0, 0.08, 0.02))
    assert stopping.reason is None
    stopping.add(record(2, 1.0, 0.08, 0.01))
    assert "8.0 ± 2.0 %" in stopping.reason


@pytest.mark.parametrize(("count", "most", "expected"), [(3, 5, [0, 1, 2]), (6, 3, [0, 2, 4]), (5, 2, [0, 2])])
def test_fewer_pictures_are_evenly_spaced(count, most, expected):
    assert spread(range(count), most) == expected
