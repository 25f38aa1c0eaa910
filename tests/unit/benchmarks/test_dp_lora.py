"""DP-SGD: gradients of single images, clipping, noise, the budget, and the adapter that comes out."""

import copy
import json
import math
import sys

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load
from scipy.stats import norm
from support.pictures import copy_emoji

from benchmarks import dp_lora, private_training
from benchmarks.privacy_budget import Budget, noise_multiplier_of
from benchmarks.private_training import (
    DpLoraOptions,
    PrivateSettings,
    denoising_losses,
    draw_images,
    parts,
    private,
    private_step,
)
from sdxl_ambient.errors import OptionError, StoreError
from sdxl_ambient.formats.record import LORA_FILE, read_training_info
from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.models.lora import add_lora
from sdxl_ambient.store.batches import collate
from sdxl_ambient.store.build import build_store
from sdxl_ambient.store.reader import LatentStore
from sdxl_ambient.store.settings import StoreSettings

SETTINGS = dict(rank=2, learning_rate=1e-3, max_train_steps=3, batch_size=2, epsilon=8.0, accountant="rdp")


@pytest.fixture(scope="module")
def clean(tmp_path_factory, encoders, schedule):
    """A store of six clean latents."""
    folder = tmp_path_factory.mktemp("private")
    images = copy_emoji(folder / "images", 6)
    settings = StoreSettings(Geometry(64), t_n=None)
    build_store(images, folder / "clean", encoders, schedule, settings, log=lambda message: None)
    return folder / "clean"


@pytest.fixture
def tuned(unet):
    """The UNet with a LoRA on every kind of layer, whose weights are all nonzero."""
    tuned = copy.deepcopy(unet)
    add_lora(tuned, rank=2, alpha=2, targets=["all"])
    generator = torch.Generator().manual_seed(0)
    for p in tuned.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return tuned.train()


def trained(unet):
    return [p for p in unet.parameters() if p.requires_grad]


def flat(gradients) -> torch.Tensor:
    return torch.cat([g.flatten() for g in gradients])


def one_by_one(unet, schedule, store, items, draws) -> torch.Tensor:
    """Gradients (images, numbers) of each image alone, without opacus."""
    found = []
    for item in items:
        losses = denoising_losses(unet, schedule, collate([store[item]]), draws, 0)
        found.append(flat(torch.autograd.grad(losses.mean(), trained(unet))))
    return torch.stack(found)


def settings(**changed) -> PrivateSettings:
    return DpLoraOptions(**{**SETTINGS, **changed}).settings()


def update(unet, schedule, store, lists, draws=1, multiplier=0.0, batch_size=1, **changed) -> torch.Tensor:
    """What DP-SGD hands to Adam for lists of (position, index), times ``batch_size``: the noisy sum."""
    module, optimizer = private(unet, batch_size, multiplier, settings(**changed))

    def losses_of(items):
        return denoising_losses(module, schedule, collate([store[i] for i in items]), draws, 0)

    private_step(module, optimizer, lists, losses_of, draws)
    found = flat([p.grad for p in trained(unet)]) * batch_size
    module.to_standard_module()
    return found


# -- what needs no opacus ----------------------------------------------------------------------


def test_without_opacus_one_line_says_how_to_get_it(monkeypatch, clean, miniature, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(OptionError, match=r"pip install opacus==1\.6\.0") as error:
        private_training.train_dp_lora(miniature, clean, tmp_path / "out", **SETTINGS)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epsilon": 0}, "--epsilon: 0.0 is below the smallest allowed value, 0.1"),
        ({"epsilon": None}, "--epsilon: a value is required"),
        ({"epsilon": 200, "accountant": "prv"}, "--epsilon: 200.0 overflows prv"),
        ({"delta": 1.0}, "--delta: 1.0 is a probability"),
        ({"max_grad_norm": -1}, "--max_grad_norm"),
        ({"batchsize": 4}, "did you mean 'batch_size'"),
    ],
)
def test_wrong_settings_are_refused_by_name(clean, miniature, tmp_path, changed, message):
    with pytest.raises(OptionError, match=message):
        private_training.train_dp_lora(miniature, clean, tmp_path, **{**SETTINGS, **changed})


def test_images_are_drawn_one_by_one_with_the_given_probability():
    """Poisson subsampling: sizes scatter as a binomial's, and a step may be empty."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([len(draw_images(50, 0.04, generator)) for _ in range(4000)]).double()
    assert abs(sizes.mean() - 2) < 6 * math.sqrt(1.92 / 4000)
    assert abs(sizes.var() / 1.92 - 1) < 0.15
    assert abs((sizes == 0).double().mean() - 0.96**50) < 0.03
    assert draw_images(5, 1.0, generator) == [0, 1, 2, 3, 4]


def test_a_step_is_taken_in_parts_that_hold_every_image_once(clean):
    store = LatentStore(clean)
    assert parts(store, [5, 0, 2, 3, 4], 2) == [[0, 2], [3, 4], [5]]
    assert parts(store, [], 2) == [[]]


def test_a_store_that_is_not_clean_or_smaller_than_a_batch_is_refused(build, emoji, clean, miniature, tmp_path):
    pytest.importorskip("opacus")
    build(emoji, tmp_path / "noisy", t_n=300)
    with pytest.raises(StoreError, match="t_n = 300"):
        private_training.train_dp_lora(miniature, tmp_path / "noisy", tmp_path / "out", **SETTINGS)
    with pytest.raises(OptionError, match="--batch_size: 7 is more than the 6 images"):
        private_training.train_dp_lora(miniature, clean, tmp_path / "out", **{**SETTINGS, "batch_size": 7})


# -- gradients, clipping, noise ----------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 3])
def test_each_image_has_the_gradient_that_it_has_alone(tuned, schedule, clean, draws):
    pytest.importorskip("opacus")
    store, items = LatentStore(clean), [(10 + i, i) for i in range(4)]
    want = one_by_one(tuned, schedule, store, items, draws)
    module, optimizer = private(tuned, 4, 0.0, settings())
    losses = denoising_losses(module, schedule, collate([store[i] for i in items]), draws, 0)
    private_training.take_gradients(losses, draws, optimizer.params)
    got = torch.cat([p.grad_sample.flatten(1) for p in trained(tuned)], 1)
    assert got.shape == want.shape and (want.norm(dim=1) > 0.1).all()
    gap = (got - want).norm(dim=1) / want.norm(dim=1)
    assert gap.max() < 1e-4
    # Every layer has its part, none is filled up by the others.
    sizes = [p.numel() for p in trained(tuned)]
    for a, b in zip(got.split(sizes, 1), want.split(sizes, 1), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
    assert (torch.stack([w.norm() for w in want.split(sizes, 1)]) > 0).all()


@pytest.mark.parametrize("size", [5, 2])
def test_every_image_is_clipped_before_the_sum_however_a_step_is_split(tuned, schedule, clean, size):
    pytest.importorskip("opacus")
    store = LatentStore(clean)
    lists = [[(i, i) for i in part] for part in parts(store, [0, 1, 2, 3, 5], size)]
    alone = one_by_one(tuned, schedule, store, [i for part in lists for i in part], 2)
    norms = alone.norm(dim=1)
    limit = float(norms.median())  # some are clipped and some are not
    want = (alone * (limit / norms).clamp(max=1)[:, None]).sum(0)
    got = update(tuned, schedule, store, lists, draws=2, batch_size=3, max_grad_norm=limit)
    assert (got - want).norm() < 1e-4 * want.norm()
    single = update(tuned, schedule, store, [lists[0][:1]], max_grad_norm=0.01)
    assert 0.0099 < single.norm() <= 0.01 * (1 + 1e-5)


def test_a_step_without_images_is_one_of_noise_of_the_promised_size(tuned, schedule, clean):
    pytest.importorskip("opacus")
    before = flat(trained(tuned)).clone()
    noise = update(tuned, schedule, LatentStore(clean), [[]], multiplier=3.0, batch_size=4, max_grad_norm=0.5)
    # The spread of n normal numbers is known to 1/√(2n); a seed decides, so that nothing depends on chance.
    assert abs(noise.std() / (3.0 * 0.5) - 1) < 5 / math.sqrt(2 * len(noise))
    assert not torch.equal(flat(trained(tuned)), before)
    assert update(copy.deepcopy(tuned), schedule, LatentStore(clean), [[]], multiplier=0.0).abs().max() == 0


def test_the_noise_is_added_once_and_on_top_of_the_clipped_sum(tuned, schedule, clean):
    pytest.importorskip("opacus")
    store, lists = LatentStore(clean), [[(0, 0), (1, 1)], [(2, 2)]]
    start = {name: p.detach().clone() for name, p in tuned.named_parameters()}

    def with_noise(lists, multiplier):
        tuned.load_state_dict(start)
        return update(tuned, schedule, store, lists, multiplier=multiplier, max_grad_norm=0.3)

    clipped, noise = with_noise(lists, 0.0), with_noise([[]], 2.0)
    torch.testing.assert_close(with_noise(lists, 2.0), clipped + noise, rtol=1e-5, atol=1e-5)


# -- the budget ----------------------------------------------------------------------


def delta_of_gaussian(epsilon: float, mu: float) -> float:
    """Of k Gaussian mechanisms with noise σ, μ = √k/σ: exact (Balle and Wang 2018, arXiv 1805.06530, Theorem 8)."""
    return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu))


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_whole_batches_spend_what_gaussian_mechanisms_do(accountant):
    pytest.importorskip("opacus")
    budget = Budget(epsilon=5.0, delta=1e-3, steps=40, images=32, batch_size=32, accountant=accountant)
    multiplier = noise_multiplier_of(budget)
    exact = delta_of_gaussian(5.0, math.sqrt(40) / multiplier)
    assert exact <= 1e-3  # never more is spent than was promised
    assert exact > (0.9e-3 if accountant == "prv" else 1e-4)
    assert 4.9 < budget.spent(multiplier, 40) <= 5.0
    assert budget.spent(multiplier, 20) < 4.0


def test_drawing_fewer_images_needs_less_noise():
    pytest.importorskip("opacus")
    whole, part = (noise_multiplier_of(Budget(5.0, 1e-3, 10, 64, b, "rdp")) for b in (64, 16))
    assert part < 0.6 * whole


# -- the whole run ----------------------------------------------------------------------


def test_a_run_gives_a_stock_adapter_with_its_promise_and_can_be_repeated(clean, miniature, tmp_path, capsys):
    pytest.importorskip("opacus")
    record = private_training.train_dp_lora(str(miniature), clean, tmp_path / "a", **SETTINGS, targets=["attention"])
    assert record == json.loads((tmp_path / "a" / "dp_lora.json").read_text())
    assert record["delta"] == 1 / 60 and record["sample_rate"] == 2 / 6
    assert (record["images"], record["steps"]) == (6, 3)
    assert 7.9 < record["epsilon"] <= 8 and record["noise_multiplier"] > 0
    assert record["cpu_seconds"] > 0 and record["wall_seconds"] > 0

    pipe = StableDiffusionXLPipeline.from_pretrained(miniature, add_watermarker=False)
    pipe.load_lora_weights(tmp_path / "a")
    loaded = {name: p for name, p in pipe.unet.named_parameters() if "lora_B" in name}
    assert loaded and all(p.abs().max() > 0 for p in loaded.values())  # they start at zero

    info = read_training_info(tmp_path / "a")
    assert info["t_n"] is None and info["step"] == 3
    promise = info["differential_privacy"]
    assert promise["epsilon"] == record["epsilon"] and promise["unit"] == "one image with its captions"
    # What gives a single image or the noise away isn't told.
    assert "data" not in info and LatentStore(clean).hash not in json.dumps(info)
    assert "seed" not in json.dumps([info, record])

    # In parts of one image, and by the command line: the same but for the order of sums; the draws are per image.
    flags = {**SETTINGS, "targets": "attention", "micro_batch_size": 1}
    folders = dict(pretrained_model_name_or_path=miniature, latents_dir=clean, output_dir=tmp_path / "b")
    argv = [str(part) for name, value in {**folders, **flags}.items() for part in (f"--{name}", value)]
    capsys.readouterr()
    assert dp_lora.main(argv) == 0
    assert json.loads(capsys.readouterr().out)["evaluations"] == record["evaluations"]
    a, b = (weights(tmp_path / name / LORA_FILE) for name in "ab")
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)
    assert dp_lora.main(argv) == 2
    assert "holds an adapter already" in capsys.readouterr().err

    again, other = (
        private_training.train_dp_lora(miniature, clean, tmp_path / name, **SETTINGS, targets=["attention"], seed=seed)
        for name, seed in (("c", 0), ("d", 1))
    )
    assert again["evaluations"] == record["evaluations"] and other["epsilon"] == record["epsilon"]
    c, d = (weights(tmp_path / name / LORA_FILE) for name in "cd")
    assert all(torch.equal(a[name], c[name]) and not torch.equal(a[name], d[name]) for name in a)


def weights(file) -> dict[str, torch.Tensor]:
    return load(file.read_bytes())
