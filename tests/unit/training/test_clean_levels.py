"""Clean latents at t ≤ t_n: exact on Gaussian data, never above a picture's own level, and never there unless asked for."""

import json
import shutil

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from support.gaussian import Gaussian
from support.pictures import copy_emoji
from support.running import arguments, assert_identical, states, train_here
from support.stores import latents_in

from sdxl_ambient import objective
from sdxl_ambient.errors import StoreError
from sdxl_ambient.hub.card import fitting_sampler, model_card
from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.noise import PREDICTION_TYPES, NoiseSchedule
from sdxl_ambient.objective import ExtraRows, ObjectiveOptions, ambient_objective
from sdxl_ambient.store.build import build_store
from sdxl_ambient.store.prenoised import fingerprint_of_latents
from sdxl_ambient.store.reader import LatentStore, Presentation
from sdxl_ambient.store.settings import StoreSettings
from sdxl_ambient.training.clean_levels import CleanLevels

FOLDER = "latents_clean_unprotected"
LEVELS = {0: 500, 1: 3, 2: -1, 3: 120}  # the others: 500


# -- exactness ----------------------------------------------------------------------------------------------------


TIMES = 6


def few_times(prediction_type):
    scheduler = DDPMScheduler(
        num_train_timesteps=TIMES, beta_start=0.05, beta_end=0.4, beta_schedule="linear", prediction_type=prediction_type
    )
    return NoiseSchedule.from_scheduler(scheduler)


class Points:
    """In place of chance: every point of the data's exact moments at every time that its level leaves, equally often."""

    def __init__(self, generator, count):
        self.count = count

    def uniform(self):
        return ((torch.arange(self.count) // 64 % 4).double() + 0.5) / 4

    def normal(self, like):
        return Gaussian().points()[2].repeat(self.count // 64, 1)


def minimiser(schedule, x_n, t_n, clean, options):
    """Of a linear model per time, (W_t, b_t): the exact minimum of the whole objective, which is quadratic in them."""

    def loss(theta):
        weights, bias = theta[: TIMES * 4].reshape(TIMES, 2, 2), theta[TIMES * 4 :].reshape(TIMES, 2)

        def denoise(x_t, t):
            return torch.einsum("bij,bj->bi", weights[t], x_t) + bias[t]

        return ambient_objective(denoise, schedule, x_n, t_n, None, options, clean).total

    zero = torch.zeros(TIMES * 6, dtype=torch.float64)
    gradient = torch.autograd.functional.jacobian(loss, zero)
    theta = torch.linalg.solve(torch.autograd.functional.hessian(loss, zero, vectorize=True), -gradient)
    return theta[: TIMES * 4].reshape(TIMES, 2, 2), theta[TIMES * 4 :].reshape(TIMES, 2)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("levels", "shift"), [((1,), 0.0), ((1, 3), 0.0), ((1,), 5.0), ((3,), 5.0)])
def test_the_minimiser_is_the_posterior_mean_at_every_time(levels, shift, prediction_type, monkeypatch):
    """The noisy data give the levels above t_n, the clean data those at and below it, and neither reaches the other's:
    clean data that lie elsewhere (``shift``) are what is learnt up to t_n and leave no trace above it."""
    schedule, data, elsewhere = few_times(prediction_type), Gaussian(), Gaussian()
    elsewhere.mean = data.mean + shift
    monkeypatch.setattr(objective, "Randomness", Points)
    t_n = torch.tensor(levels).repeat_interleave(64 * 4)
    x_0, z, _ = (p.repeat(len(t_n) // 64, 1) for p in data.points())
    clean = ExtraRows(elsewhere.points()[0].repeat(len(t_n) // 64, 1), t_n, "clean")
    options = ObjectiveOptions(restore_weight=0.3)  # each level has its own minimum, whatever the weight
    weights, bias = minimiser(schedule, schedule.observe(x_0, t_n, z), t_n, clean, options)
    x_t = torch.tensor([[0.0, 0.0], [1.5, -0.5], [-2.0, 1.0]], dtype=torch.float64)
    for time in range(TIMES):
        t = torch.full((3,), time)
        want = (elsewhere if time <= levels[0] else data).epsilon(schedule, x_t, t[0])
        epsilon = schedule.epsilon(x_t @ weights[time].T + bias[time], x_t, t)
        torch.testing.assert_close(epsilon, want, rtol=1e-6, atol=1e-6)


# -- the two stores -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """Six emoji, four of which have a level of their own; one of them is clean."""
    folder = copy_emoji(tmp_path_factory.mktemp("data") / "emoji", 6)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows = [{**row, "level": LEVELS.get(i)} for i, row in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, emoji, encoders, schedule):
    """Two stores: noisy latents at levels of their own, and clean ones."""
    folder = tmp_path_factory.mktemp("stores")
    noisy, clean = StoreSettings(Geometry(64), t_n_column="level"), StoreSettings(Geometry(64), t_n=None)
    for name, settings in ("noisy", noisy), ("clean", clean):
        build_store(emoji, folder / name, encoders, schedule, settings, log=lambda message: None)
    return folder


def opened(folder, name="clean"):
    return LatentStore(folder / name, presentation=Presentation(random_flip=True)), LatentStore(folder / "noisy")


def test_no_row_is_trained_above_its_own_pictures_level(folder, schedule):
    clean, noisy = opened(folder)
    own = {i["content"]: i["t_n"] for i in noisy.images if i["t_n"] is not None}
    levels = CleanLevels(clean, noisy, 4, seed=0)
    shown, times = set(), []
    latents = latents_in(folder / "clean")
    for batch in levels.batches(0, 50):
        rows = levels.clean_rows(batch)
        for x_0, content, flipped in zip(rows.x_0, batch.contents, batch.flipped, strict=True):
            assert torch.equal(x_0, latents[content].flip(-1) if flipped else latents[content])

        def denoise(x_t, t):
            times.append(t)
            return x_t

        options = ObjectiveOptions(t_sampling="near")
        drawn = levels.generators(batch)
        losses = ambient_objective(denoise, schedule, rows.x_0[:0], rows.t_max[:0], drawn, options, rows)
        assert "clean" in losses.means() and "restored" not in losses.means()
        top = torch.tensor([own[content] for content in batch.contents])
        assert bool((times[-1] <= top).all()) and bool((times[-1] >= 0).all())
        shown |= set(batch.contents)
    assert shown == own.keys() and len(own) == 5  # the picture that is clean in the noisy store trains all levels there
    # 200 draws, 40 of each picture; those up to 500 reach far up.
    assert torch.cat(times).max() > 400


def test_the_stream_is_the_same_for_any_number_of_processes_and_worker(folder):
    clean, noisy = opened(folder)
    one = CleanLevels(clean, noisy, 4, seed=3)
    two = [CleanLevels(clean, noisy, 2, seed=3, rank=r, processes=2) for r in range(2)]
    assert one.record == two[0].record == {"clean_samples_per_pass": 4}
    whole = list(one.batches(0, 6))
    for batch, *parts in zip(whole, *(levels.batches(0, 6) for levels in two), strict=True):
        assert batch.contents == parts[0].contents + parts[1].contents
        assert batch.positions == parts[0].positions + parts[1].positions
        drawn = [g.initial_seed() for levels, part in zip(two, parts, strict=True) for g in levels.generators(part)]
        assert [g.initial_seed() for g in one.generators(batch)] == drawn
    later = list(CleanLevels(clean, noisy, 4, seed=3).batches(4, 6))
    assert [b.contents for b in later] == [b.contents for b in whole[4:]]
    # Neither the order of the noisy batches nor their noise.
    assert len({tuple(b.contents) for b in whole}) > 1 and one.generators(whole[0])[0].initial_seed() not in {
        g.initial_seed() for g in whole[0].generators(3)
    }


def test_stores_of_other_pictures_or_settings_are_refused(folder, encoders, schedule):
    def refused(match, change=lambda clean, noisy: None, name="clean"):
        clean, noisy = opened(folder, name)
        change(clean, noisy)
        with pytest.raises(StoreError, match=match) as error:
            CleanLevels(clean, noisy, 2, seed=0)
        assert "\n" not in str(error.value)

    def pre_noised(clean, noisy):
        noisy.manifest["fingerprint"] = fingerprint_of_latents(encoders, schedule, 500)

    def cropped(clean, noisy):
        for entry in clean.images:
            entry["time_ids"] = [64, 64, 4, 0, 64, 64]

    def restored(clean, noisy):
        clean.lineage = [{"foreign_model": False}]

    def two_sizes(clean, noisy):
        clean.images[0]["time_ids"] = noisy.images[0]["time_ids"] = [64, 64, 0, 0, 64, 32]

    refused("holds noisy ones; give another --clean_latents_dir", name="noisy")
    refused("holds restored samples; give another --clean_latents_dir", restored)
    own = opened(folder)[1]
    protected = next(i for i, entry in enumerate(own.images) if entry["t_n"] is not None)
    refused("lacks 1 and has 0 others", lambda clean, noisy: clean.images.pop(protected))
    refused("lacks 0 and has 1 others", lambda clean, noisy: noisy.images.pop())
    refused("was made with other settings than .*noisy: 5 of its images are cropped otherwise", cropped)
    refused("its VAE, geometry or schedule is another", pre_noised)
    refused("needs images of one size", two_sizes)


# -- through the script -------------------------------------------------------------------------------------------


def clean_tensors(folder, latents):
    """What in ``folder`` holds a file with a tensor that is one of the clean latents."""
    shape = next(iter(latents.values())).shape
    found = set()
    for path in folder.rglob("*.safetensors"):
        for x in load_file(path).values():
            if x.shape == shape and any((x - x_0).abs().mean() < 1e-3 for x_0 in latents.values()):
                found.add(path.relative_to(folder).parts[0])
    return found


def test_resumed_equals_uninterrupted_and_the_run_says_what_it_gives_up(emoji, folder, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = {
        "low_noise": "clean", "t_n_column": "level", "clean_weight": 0.5, "random_flip": "true", "max_train_steps": 3,
        "proportion_empty_prompts": 0.3, "snr_gamma": 5, "latents_dir": tmp_path / "latents",
    }  # fmt: skip
    assert train_here(arguments(emoji, whole, **common)) == 0
    printed = capsys.readouterr()
    (warning,) = [line for line in printed.out.splitlines() if line.startswith("warning: ")]
    assert str(whole / FOLDER) in warning and "no longer holds" in warning and "decode to the images" in warning
    assert "clean=" in printed.err and "restored=" not in printed.err
    # Clean latents are where the name says so, and nowhere else.
    latents = latents_in(folder / "clean")
    assert_identical(latents_in(whole / FOLDER), latents)
    assert clean_tensors(whole, latents) == {FOLDER}
    info = json.loads((whole / "training.json").read_text())
    assert info["low_noise"] == "clean" and fitting_sampler(info) == "full"
    text = model_card(whole, info, repo_id="me/emoji", license="openrail++")
    assert "it was trained on their **clean** latents, and noise protects nothing" in text and "no clean one" not in text

    shutil.copytree(whole / "checkpoint-2", parts / "checkpoint-2")
    more = {"clean_latents_dir": whole / FOLDER, "resume_from_checkpoint": "latest"}
    assert train_here(arguments(emoji, parts, **common, **more)) == 0
    assert_identical(states(whole / "checkpoint-3"), states(parts / "checkpoint-3"))
    assert not (parts / FOLDER).exists()

    # Another share of clean rows is another run.
    assert train_here(arguments(emoji, parts, **common, **more, clean_batch_size=1)) == 2
    assert "clean_samples_per_pass: stored 2, wanted 1" in capsys.readouterr().err


@pytest.mark.parametrize("low_noise", ["skip", "restore"])
def test_without_it_no_clean_latent_is_ever_written(emoji, folder, tmp_path, low_noise, capsys):
    changes = dict(low_noise=low_noise, clean_weight=2, max_train_steps=1, train_batch_size=2, restore_steps=1)
    assert train_here(arguments(emoji, tmp_path / "run", **changes)) == 0
    assert clean_tensors(tmp_path, latents_in(folder / "clean")) == set()
    assert not [p for p in tmp_path.rglob("*") if "clean" in p.name]
    printed = capsys.readouterr().out
    assert "warning" not in printed and "clean latents" not in printed
