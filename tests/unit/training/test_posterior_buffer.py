"""Restored samples: the buffer alone, and both treatments of the low levels through the training script."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.pictures import copy_emoji
from support.running import arguments, assert_identical, launch, states, train_here

from sdxl_ambient.errors import StoreError
from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.models.denoiser import Denoiser
from sdxl_ambient.store.batches import collate
from sdxl_ambient.store.build import build_store
from sdxl_ambient.store.checks import check_stores
from sdxl_ambient.store.reader import LatentStore
from sdxl_ambient.store.scan import content_hash
from sdxl_ambient.store.settings import StoreSettings
from sdxl_ambient.training.ema import EMA
from sdxl_ambient.training.posterior_buffer import PosteriorBuffer, RestoreOptions
from sdxl_ambient.training.state import load_tree


@pytest.fixture(scope="module")
def folder(tmp_path_factory, encoders, schedule):
    folder = tmp_path_factory.mktemp("data")
    build_store(copy_emoji(folder / "emoji", 6), folder / "store", encoders, schedule,
                StoreSettings(Geometry(64), noise_key_file=str(folder / "key")))  # fmt: skip
    return folder


@pytest.fixture
def store(folder):
    return LatentStore(folder / "store")


HOW = RestoreOptions(batch_size=3, refresh=1, steps=2, levels="low")


def drawn(restoration, unet, schedule, start, stop):
    """Everything that the batches from ``start`` to before ``stop`` are given, in order."""
    out = []
    for batch in restoration.batches(start, stop):
        denoise = Denoiser(unet, batch.conditioning)
        restored = restoration.restored(batch, denoise, schedule, restoration.generators(batch))
        restoration.commit()
        out.append((batch.contents, restored.x_0, restored.t_max))
    return out


def test_samples_are_the_models_own_and_drawn_a_slice_at_a_time(store, unet, schedule):
    restoration = PosteriorBuffer(store, HOW, seed=0)
    first, second, third, fourth = drawn(restoration, unet, schedule, 0, 4)
    assert set(first[0]) | set(second[0]) == {i["content"] for i in store.images}  # six images, batches of three
    assert all(t.tolist() == [500] * 3 for _, _, t in (first, second, third, fourth))
    before = {c: x for contents, x_0, _ in (first, second) for c, x in zip(contents, x_0, strict=True)}
    for contents, x_0, _ in (third, fourth):  # the first of each batch is drawn anew, the others are what they were
        assert [torch.equal(x, before[c]) for c, x in zip(contents, x_0, strict=True)] == [False, True, True]
    again = drawn(PosteriorBuffer(store, HOW, seed=0), unet, schedule, 0, 4)
    assert_identical([x for _, x, _ in again], [x for _, x, _ in (first, second, third, fourth)])
    other = drawn(PosteriorBuffer(store, HOW, seed=1), unet, schedule, 0, 2)
    assert not any(torch.equal(x, y) for (_, x, _), (_, y, _) in zip(other, (first, second), strict=True))


def test_a_sample_is_near_its_image_and_is_no_copy_of_the_noisy_latent(store, unet, schedule, encoders, folder):
    """At t_n = 500 the model restores most of the picture; what is kept is neither x_n nor the clean latent."""
    from sdxl_ambient.images.load import load_rgb
    from sdxl_ambient.models.vae import encode_image

    restoration = PosteriorBuffer(store, RestoreOptions(6, 6, 10, "low"), seed=0)
    ((contents, x_0, _),) = drawn(restoration, unet, schedule, 0, 1)
    by_content = {i["content"]: i for i in store.images}
    restored, noisy = [], []
    for content, sample in zip(contents, x_0, strict=True):
        entry = by_content[content]
        x_n = store[0, store.images.index(entry)]["x_n"]
        image = load_rgb(next(p for p in sorted((folder / "emoji").glob("*.png")) if content_hash(load_rgb(p)) == content))
        clean = encode_image(encoders.vae, Geometry(64).apply(image, content)[0])
        restored.append((sample - clean).square().mean())
        noisy.append((x_n - clean).square().mean())
        assert restored[-1] > 1e-3 and not torch.equal(sample, x_n)
    # One draw of one picture may go wrong; six of them do not.
    assert sum(restored) < 0.8 * sum(noisy)


def test_shards_are_disjoint_and_a_checkpoint_serves_any_number_of_processes(store, unet, schedule, tmp_path):
    two = [PosteriorBuffer(store, HOW, seed=0, rank=r, processes=2) for r in range(2)]
    for restoration in two:
        drawn(restoration, unet, schedule, 0, 1)
        restoration.save(tmp_path)
    assert not set(two[0].samples) & set(two[1].samples) and len(two[0].samples) + len(two[1].samples) == 6
    one = PosteriorBuffer(store, HOW, seed=0)
    one.load(tmp_path)
    assert_identical(one.samples, {**two[0].samples, **two[1].samples})
    assert len(one.samples) == 6
    three = PosteriorBuffer(store, HOW, seed=0, rank=2, processes=3)
    three.load(tmp_path)
    assert len(three.samples) == 2


def test_all_levels_are_asked_for(store, unet, schedule):
    ((_, _, t_max),) = drawn(PosteriorBuffer(store, RestoreOptions(2, 1, 1, "all"), seed=0), unet, schedule, 0, 1)
    assert t_max.tolist() == [999, 999]


def test_impossible_restorations_are_refused(store):
    with pytest.raises(StoreError, match="6 images, 7 processes"):
        PosteriorBuffer(store, HOW, seed=0, rank=6, processes=7)
    store.images = [{**i, "t_n": None} for i in store.images]
    with pytest.raises(StoreError, match="the store holds clean ones"):
        PosteriorBuffer(store, HOW, seed=0)


def test_averaged_weights_are_swapped_in_and_out(unet, store):
    import copy

    module = copy.deepcopy(unet).requires_grad_(True).train()
    average = EMA(module, decay=0.5)
    for _ in range(3):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(1e-3)
        average.update()
    weights = [p.detach().clone() for p in module.parameters()]
    batch = collate([store[0, 0]])
    x, t = batch.x_n, torch.tensor([10])
    inside = Denoiser(average, batch.conditioning)(x, t)
    assert module.training and all(torch.equal(p, w) for p, w in zip(module.parameters(), weights, strict=True))
    with average.weights():
        assert not module.training
        assert not any(torch.equal(p, w) for p, w in zip(module.parameters(), weights, strict=True))
        with torch.no_grad():
            torch.testing.assert_close(Denoiser(module, batch.conditioning)(x, t), inside)


def test_clean_stores_have_no_low_levels(store, schedule):
    check_stores(store, None, schedule, "restore")
    store.manifest["images"] = [{**i, "t_n": None} for i in store.manifest["images"]]
    check_stores(store, None, schedule, "skip")
    for low_noise in ("restore", "consistency"):
        with pytest.raises(StoreError, match=f"--low_noise: '{low_noise}' has nothing to do, .* holds clean latents"):
            check_stores(store, None, schedule, low_noise)


def test_what_an_unfinished_step_drew_is_not_in_its_checkpoint(store, unet, schedule, tmp_path):
    """A resume takes the step again, and must draw again what it drew."""
    restoration = PosteriorBuffer(store, HOW, seed=0)
    (batch,) = restoration.batches(0, 1)
    x_0 = restoration.restored(batch, Denoiser(unet, batch.conditioning), schedule, restoration.generators(batch)).x_0
    restoration.save(tmp_path / "before")
    restoration.commit()
    restoration.save(tmp_path / "after")
    before, after = (PosteriorBuffer(store, HOW, seed=0) for _ in range(2))
    before.load(tmp_path / "before")
    after.load(tmp_path / "after")
    assert not before.samples
    assert_identical([after.samples[c] for c in batch.contents], list(x_0))


def test_samples_that_are_not_finite_are_refused(store, schedule):
    restoration = PosteriorBuffer(store, HOW, seed=0)

    def broken(x, t, **conditioning):
        return (x * float("nan"),)

    with pytest.raises(FloatingPointError, match="lower --learning_rate"):
        drawn(restoration, broken, schedule, 0, 1)
    assert not restoration.samples  # nothing that is not finite gets into the buffer


# -- through the script ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    return copy_emoji(tmp_path_factory.mktemp("data") / "emoji", 6)


@pytest.mark.parametrize(
    "changes",
    [
        dict(low_noise="consistency", consistency_every=2, consistency_start=1, consistency_batch=3),
        dict(low_noise="restore", consistency_weight=0.1, consistency_teacher="ema", snr_gamma=5.0),
        dict(low_noise="restore", restore_levels="all", restore_start=1, finetune="full"),
        dict(low_noise="restore", restore_levels="all", restore_teacher="base"),
        dict(low_noise="restore", consistency_weight=0.1, antithetic="true", balance_cap=25, t_sampling="near"),
    ],
)
def test_resumed_equals_uninterrupted(emoji, tmp_path, changes, capsys):
    """Invariant 6 with what the low levels add: averaged weights and the buffer of restored samples."""
    common = dict(latents_dir=tmp_path / "latents", max_train_steps=4, restore_steps=3, **changes)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_here(arguments(emoji, whole, **common)) == 0
    part = "consistency" if changes["low_noise"] == "consistency" else "restored"
    assert f"{part}=" in capsys.readouterr().err
    shutil.copytree(whole / "checkpoint-2", parts / "checkpoint-2")
    assert train_here(arguments(emoji, parts, **common, resume_from_checkpoint="latest")) == 0
    if changes.get("finetune") != "full":
        assert_identical(states(whole / "checkpoint-4"), states(parts / "checkpoint-4"))
    files = sorted(p.relative_to(whole / "checkpoint-4") for p in (whole / "checkpoint-4").rglob("*.safetensors"))
    assert (changes["low_noise"] == "restore") == any(f.parts[0] == "restored" for f in files)
    for file in files:
        assert_identical(load_file(whole / "checkpoint-4" / file), load_file(parts / "checkpoint-4" / file))
    trees = sorted((whole / "checkpoint-4").glob("registered_*.safetensors"))
    assert trees
    for file in trees:
        assert_identical(load_tree(file), load_tree(parts / "checkpoint-4" / file.name))


def test_the_base_restores_alike_whatever_was_learnt(emoji, tmp_path):
    """Steps of another size change what the averaged weights restore, and not what the base does."""
    found = {}
    for teacher in ("base", "ema"):
        for rate in (1e-4, 1e-2):
            out = tmp_path / f"{teacher}-{rate}"
            changes = dict(low_noise="restore", restore_steps=2, max_train_steps=2, learning_rate=rate)
            changes |= dict(restore_teacher=teacher, latents_dir=tmp_path / "latents")
            assert train_here(arguments(emoji, out, **changes)) == 0
            found[teacher, rate] = load_file(out / "checkpoint-2/restored/rank-00000.safetensors")
    assert_identical(found["base", 1e-4], found["base", 1e-2])
    same = [torch.equal(a, found["ema", 1e-2][k]) for k, a in found["ema", 1e-4].items()]
    assert not all(same)


@pytest.mark.slow
def test_two_processes_each_restore_their_own_share(emoji, tmp_path):
    common = dict(low_noise="restore", train_batch_size=2, max_train_steps=4, restore_steps=2, consistency_weight=0.1,
                  latents_dir=tmp_path / "latents", noise_key_file=tmp_path / "key")  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    launch(arguments(emoji, whole, **common), processes=2)
    shards = [load_file(p) for p in sorted((whole / "checkpoint-4/restored").iterdir())]
    assert len(shards) == 2 and not set(shards[0]) & set(shards[1])
    shutil.copytree(whole / "checkpoint-2", parts / "checkpoint-2")
    launch(arguments(emoji, parts, **common, resume_from_checkpoint="latest"), processes=2)
    assert_identical(states(whole / "checkpoint-4"), states(parts / "checkpoint-4"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(low_noise="consistency", t_n="none"), "--low_noise: 'consistency' has nothing to do at --t_n none"),
        (dict(consistency_weight=1.0), "--consistency_weight: 1.0 needs --low_noise consistency or restore, not skip"),
        (dict(low_noise="consistency", consistency_weight=0), "--consistency_weight: 0 leaves --low_noise consistency"),
        (dict(low_noise="restore", restore_refresh=3), "--restore_refresh: 3 is more than the 2 restored samples"),
        (
            dict(low_noise="restore", restore_levels="all", consistency_weight=1.0),
            "--consistency_weight: has no noisy batch to start from",
        ),
        (
            dict(low_noise="restore", consistency_weight=1.0, consistency_teacher="ema", restore_teacher="base"),
            "--restore_teacher: 'base' excludes --consistency_teacher ema; allowed is ema",
        ),
        (dict(snr_gamma=5, debiased_estimation_loss="true"), "--debiased_estimation_loss: true excludes --snr_gamma"),
        (dict(snr_gamma=5, balance_cap=25), "--balance_cap: 25 excludes --snr_gamma; allowed is one of them"),
        (dict(balance_cap=0.5), "--balance_cap: 0.5 is below the smallest allowed value, 1"),
        (dict(low_noise="omni"), "--low_noise: 'omni' is not one of skip, consistency, restore"),
    ],
)
def test_wrong_options_are_one_line(emoji, tmp_path, capsys, changes, message):
    import train_sdxl_ambient

    with pytest.raises(SystemExit):
        train_sdxl_ambient.main(arguments(emoji, tmp_path / "run", **changes))
    printed = capsys.readouterr().err.strip()
    assert message in printed and "\n" not in printed
