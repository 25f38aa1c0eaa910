"""The order of samples follows from the seed alone, whatever the processes, workers or interruptions."""

import json

import pytest
import torch
from accelerate import PartialState
from conftest import copy_emoji
from safetensors.torch import load

from sdxl_ambient.data import Batch, LatentStore, Stream, loader, sample_generator
from sdxl_ambient.geometry import Geometry
from sdxl_ambient.latents import build_store
from sdxl_ambient.noise import CLEAN
from sdxl_ambient.plan import StoreError


def positions(stream) -> list[tuple[int, int]]:
    return [item for batch in stream for item in batch]


@pytest.fixture(scope="module")
def store(tmp_path_factory, encoders, schedule):
    """A store of six emoji, two to a shard; one of them twice, with another caption."""
    folder = tmp_path_factory.mktemp("data")
    images = copy_emoji(folder / "images", 6)
    first = sorted(images.glob("*.png"))[0]
    (images / "copy.png").write_bytes(first.read_bytes())
    (images / "copy.txt").write_text("another caption of the same picture")
    build_store(
        images, folder / "store", encoders, schedule, Geometry(64), t_n=500, shard_size=2, state=PartialState(),
        say=lambda message: None,
    )  # fmt: skip
    return folder / "store"


@pytest.fixture
def copied(store, tmp_path):
    import shutil

    return shutil.copytree(store, tmp_path / "store")


# -- order ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 12])
def test_every_epoch_is_a_permutation_and_epochs_differ(size):
    items = positions(Stream(size, 4, seed=0, stop=3 * size))
    assert [p for p, _ in items] == list(range(12 * size))
    orders = [[i for _, i in items[e * size : (e + 1) * size]] for e in range(12)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert size == 1 or len({tuple(o) for o in orders}) > 1
    assert size < 7 or [i for _, i in items] != [i for _, i in positions(Stream(size, 4, seed=1, stop=3 * size))]


def test_the_global_order_is_the_same_for_any_processes_and_batch():
    """One process with four, two with two, four with one: the same samples in every step."""
    want = list(Stream(7, 4, seed=3, stop=10))
    for processes, batch in ((2, 2), (4, 1)):
        ranks = [list(Stream(7, batch, seed=3, stop=10, rank=r, processes=processes)) for r in range(processes)]
        assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == want
        assert all(len(r) == 10 for r in ranks)


def test_a_resumed_stream_is_the_tail_of_the_whole():
    whole = list(Stream(7, 3, seed=5, stop=20))
    for start in (0, 1, 9, 19, 20):
        tail = Stream(7, 3, seed=5, start=start, stop=20)
        assert list(tail) == whole[start:] and len(tail) == 20 - start


def test_every_sample_has_its_own_generator():
    def draws(seed, *positions):
        batch = Batch(torch.zeros(1), torch.zeros(1), None, list(positions), [])
        return [torch.randn(3, generator=g).tolist() for g in batch.generators(seed)]

    a = draws(0, 5, 6, 7)
    assert draws(0, 7, 5) == [a[2], a[0]] and len({tuple(x) for x in a + draws(1, 5, 6, 7)}) == 6
    assert sample_generator(0, "train", 5).initial_seed() != sample_generator(0, "heldout", 5).initial_seed()
    values = torch.tensor([torch.randn((), generator=sample_generator(0, "train", i)) for i in range(2000)])
    assert abs(values.mean()) < 0.08 and abs(values.std() - 1) < 0.05  # neighbouring seeds start alike otherwise


# -- what a batch holds ------------------------------------------------------------------------------------------


def test_a_batch_holds_what_the_store_holds(store):
    data = LatentStore(store)
    assert len(data) == 6
    stream = Stream(len(data), 4, seed=0, stop=4)
    files = {k: v for p in store.glob("*.safetensors") for k, v in load(p.read_bytes()).items()}
    captions = set()
    for items, batch in zip(stream, loader(data, stream), strict=True):
        assert batch.positions == [p for p, _ in items] and batch.t_n.tolist() == [500] * 4
        for row, (position, index) in enumerate(items):
            entry = data.images[index]
            caption = entry["captions"][position // 6 % len(entry["captions"])]
            captions.add(caption)
            assert torch.equal(batch.x_n[row], files[entry["content"]])
            assert torch.equal(batch.conditioning.prompt_embeds[row], files[f"{caption}.embeds"])
            assert torch.equal(batch.conditioning.pooled[row], files[f"{caption}.pooled"])
            assert batch.conditioning.time_ids[row].tolist() == entry["time_ids"] == [64, 64, 0, 0, 64, 64]
    assert len(captions) == 7  # the picture with two captions has shown both
    assert batch.x_n.dtype == batch.conditioning.time_ids.dtype == torch.float32


def test_a_picture_is_the_same_in_every_epoch(store):
    """Invariant 3 where training reads: no new noise from one epoch to the next."""
    data, seen = LatentStore(store), {}
    stream = Stream(len(data), 3, seed=0, stop=8)
    for items, batch in zip(stream, loader(data, stream), strict=True):
        for (_, index), x_n in zip(items, batch.x_n, strict=True):
            assert torch.equal(seen.setdefault(index, x_n.clone()), x_n)
    assert len(seen) == 6


def test_workers_give_the_same_batches(store):
    data = LatentStore(store)
    data[(0, 0)]  # an open file, which must not travel to a worker
    plain, worked = (list(loader(data, Stream(6, 4, seed=0, stop=5), workers)) for workers in (0, 2))
    assert len(plain) == len(worked) == 5
    for a, b in zip(plain, worked, strict=True):
        assert a.positions == b.positions and torch.equal(a.x_n, b.x_n)
        assert torch.equal(a.conditioning.prompt_embeds, b.conditioning.prompt_embeds)


def test_reading_draws_nothing_from_the_global_generators(store):
    data = LatentStore(store)
    state = torch.get_rng_state()
    list(loader(data, Stream(6, 4, seed=0, stop=3)))
    assert torch.equal(torch.get_rng_state(), state)


def test_clean_and_mixed_stores_have_a_level_per_sample(copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["images"][0]["t_n"], manifest["images"][1]["t_n"] = None, 0
    (copied / "manifest.json").write_text(json.dumps(manifest))
    data = LatentStore(copied)
    assert [data[(0, i)]["t_n"] for i in range(3)] == [CLEAN, 0, 500]


def test_a_limit_takes_the_first_pictures(store):
    assert len(LatentStore(store, limit=2)) == 2 and len(LatentStore(store, limit=100)) == 6
    assert LatentStore(store, limit=2).images == LatentStore(store).images[:2]


def test_the_hash_names_the_store_not_the_noise(store, copied, encoders, schedule, tmp_path):
    assert LatentStore(store).hash == LatentStore(copied).hash
    images = copy_emoji(tmp_path / "images", 6)
    options = dict(t_n=500, say=lambda message: None)
    for name in ("one", "two"):
        build_store(images, tmp_path / name / "s", encoders, schedule, Geometry(64), **options)
        assert LatentStore(tmp_path / name / "s").hash == LatentStore(store).hash
    build_store(images, tmp_path / "three" / "s", encoders, schedule, Geometry(64), **{**options, "t_n": 300})
    assert LatentStore(tmp_path / "three" / "s").hash != LatentStore(store).hash


# -- damage -------------------------------------------------------------------------------------------------------


def test_an_unfinished_store_is_refused(copied, tmp_path):
    (copied / "manifest.json").unlink()
    for folder in (copied, tmp_path / "nowhere"):
        with pytest.raises(StoreError, match="not a finished store of latents: it has no manifest.json"):
            LatentStore(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_manifest_is_refused(copied, text):
    (copied / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match="manifest.json is damaged"):
        LatentStore(copied)


@pytest.mark.parametrize("kind", ["latents", "prompts"])
@pytest.mark.parametrize("how", ["truncated", "missing", "other"])
def test_a_damaged_shard_is_named(copied, kind, how):
    path = sorted(copied.glob(f"{kind}-*.safetensors"))[0]
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    elif how == "missing":
        path.unlink()
    else:
        path.write_bytes(sorted(copied.glob("latents-*.safetensors"))[-1].read_bytes())
    data = LatentStore(copied)
    with pytest.raises(StoreError, match=f"{path.name} is damaged") as error:
        for i in range(6):
            data[(0, i)]
    assert "\n" not in str(error.value)
