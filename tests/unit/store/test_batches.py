"""The order of samples follows from the seed alone, whatever the processes, workers or interruptions."""

from collections import Counter

import pytest
import torch
from safetensors.torch import load

from sdxl_ambient.randomness import sample_generator
from sdxl_ambient.store.batches import Batch, Stream, collate, loader, small_groups
from sdxl_ambient.store.reader import LatentStore


def positions(stream) -> list[tuple[int, int]]:
    return [item for batch in stream for item in batch]


GROUPS = [list(range(0, 40, 2)), list(range(1, 41, 2)) + [41], [40], [42, 43, 44, 45]]  # 20, 21, 1 and 4 pictures


def grouped(batch=4, seed=3, stop=400, **keywords) -> Stream:
    return Stream(46, batch, seed, stop=stop, groups=GROUPS, **keywords)


def group_of(batch) -> int:
    (found,) = {next(g for g, members in enumerate(GROUPS) if i in members) for _, i in batch}
    return found


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
        ranks = [list(Stream(7, batch, seed=3, stop=10, rank_and_size=(r, processes))) for r in range(processes)]
        assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == want
        assert all(len(r) == 10 for r in ranks)


def test_a_resumed_stream_is_the_tail_of_the_whole():
    whole = list(Stream(7, 3, seed=5, stop=20))
    for start in (0, 1, 9, 19, 20):
        tail = Stream(7, 3, seed=5, start=start, stop=20)
        assert list(tail) == whole[start:] and len(tail) == 20 - start


def test_the_order_is_that_of_the_first_runs():
    """What a run of one size sees is frozen: a checkpoint of an earlier version goes on with the same data."""
    stream = Stream(7, 3, seed=5, stop=6)
    assert [i for _, i in positions(stream)] == [0, 3, 1, 4, 5, 6, 2, 2, 1, 5, 4, 0, 3, 6, 3, 4, 6, 1]
    mine = Stream(7, 3, seed=5, stop=4, groups=[range(3, 17, 2)], purpose="restore 3 of 4")
    assert [i for _, i in positions(mine)] == [3, 11, 13, 9, 7, 5, 15, 3, 5, 13, 11, 7]


def test_every_sample_has_its_own_generator():
    def draws(seed, *positions):
        no = torch.zeros(len(positions), dtype=torch.bool)
        batch = Batch(torch.zeros(1), torch.zeros(1), None, list(positions), [], no, no)
        return [torch.randn(3, generator=g).tolist() for g in batch.generators(seed)]

    a = draws(0, 5, 6, 7)
    assert draws(0, 7, 5) == [a[2], a[0]] and len({tuple(x) for x in a + draws(1, 5, 6, 7)}) == 6
    assert sample_generator(0, "train", 5).initial_seed() != sample_generator(0, "heldout", 5).initial_seed()
    values = torch.tensor([torch.randn((), generator=sample_generator(0, "train", i)) for i in range(2000)])
    assert abs(values.mean()) < 0.08 and abs(values.std() - 1) < 0.05  # neighbouring seeds start alike otherwise


def test_a_batch_is_of_one_size_and_positions_are_unique():
    batches = list(grouped())
    assert {group_of(b) for b in batches} == {0, 1, 2, 3}
    assert [p for p, _ in sum(batches, [])] == list(range(1600))


def test_the_size_of_a_batch_is_the_same_everywhere():
    """One process with four, two with two, four with one: the same samples in every step, of one size on all of them."""
    want = list(grouped(stop=60))
    for processes, batch in ((2, 2), (4, 1)):
        ranks = [list(grouped(batch, stop=60, rank_and_size=(r, processes))) for r in range(processes)]
        assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == want
        assert all(len({group_of(b) for b in parts}) == 1 for parts in zip(*ranks, strict=True))


def test_a_resumed_stream_of_several_sizes_is_the_tail_of_the_whole():
    whole = list(grouped(stop=100))
    for start in (0, 1, 11, 12, 57, 99, 100):
        assert list(grouped(start=start, stop=100)) == whole[start:]


def test_every_picture_is_shown_equally_often():
    """After every epoch of 46 pictures, each was shown as often as epochs went by, up to its group's unfinished batch."""
    batches = list(grouped(stop=46 * 25))
    shown = Counter()
    for step, batch in enumerate(batches, start=1):
        shown.update(i for _, i in batch)
        if step % 46:
            continue  # four epochs are 46 batches
        for members in GROUPS:
            counts = [shown[i] for i in members]
            assert max(counts) - min(counts) <= max(1, 4 // len(members))
            assert abs(sum(counts) - step * 4 / 46 * len(members)) < 4
    assert sum(shown.values()) == 46 * 100 and shown[40] == 100


def test_the_order_of_sizes_is_drawn_for_every_epoch():
    epochs = [[group_of(b) for b in list(grouped(stop=230))[e * 46 : (e + 1) * 46]] for e in range(5)]
    assert len({tuple(e) for e in epochs}) == 5
    assert [group_of(b) for b in grouped(stop=46, seed=4)] != epochs[0]
    # Not one size after the other: of 46 batches, 41 are of the two large groups, in about as many runs as a shuffle has.
    assert all(sum(a != b for a, b in zip(e, e[1:], strict=False)) > 15 for e in epochs)


def test_sizes_have_orders_of_their_own():
    """Two groups of equal count are not shuffled alike."""
    stream = Stream(20, 10, seed=0, stop=8, groups=[range(10), range(10, 20)])
    orders = {group: [] for group in (0, 1)}
    for batch in stream:
        orders[batch[0][1] // 10].append([i % 10 for _, i in batch])
    assert len(orders[0]) == len(orders[1]) == 4
    assert not any(order in orders[1] for order in orders[0])


def test_epochs_may_be_shorter_than_a_batch():
    """Eight pictures in batches of 100: most epochs end before a batch does."""
    groups = [[0, 1, 2], [3], [4, 5, 6, 7]]
    whole = list(Stream(8, 100, seed=0, stop=24, groups=groups))
    shown = Counter(i for batch in whole for _, i in batch)
    assert set(shown) == set(range(8)) and all(abs(n - 300) <= 100 for n in shown.values())
    assert list(Stream(8, 100, seed=0, start=17, stop=24, groups=groups)) == whole[17:]


def test_sizes_with_few_pictures_are_named():
    groups = {(64, 64): range(20), (48, 80): range(3), (80, 48): range(4)}
    (line,) = small_groups(groups, 4)
    assert line == "note: 3 pictures of 48 x 80 pixels are fewer than the 4 of a batch, which repeats them"
    assert len(small_groups(groups, 21)) == 3 and small_groups(groups, 3) == []
    assert small_groups({(64, 64): range(3)}, 4) == []  # the square alone, as ever


def test_batches_have_tokens_where_the_store_does(bucketed, store, encoders):
    data = LatentStore(bucketed)
    batch = collate([data[0, i] for i in data.groups[64, 64][:2]])
    assert batch.tokens.shape == (2, 2, 77) and batch.tokens.dtype == torch.int64
    assert encoders.tokenizers[0].decode(batch.tokens[0, 0], skip_special_tokens=True)
    assert batch.first(1).tokens.equal(batch.tokens[:1]) and len(batch.first(1).dropped) == len(batch.first(1).flipped) == 1
    plain = collate([LatentStore(store)[0, i] for i in range(2)])
    assert plain.tokens is None and plain.first(1).tokens is None


def test_a_batch_holds_what_the_store_holds(store):
    data = LatentStore(store)
    assert len(data) == 6
    stream = Stream(len(data), 4, seed=0, stop=4)
    files = {k: v for p in store.glob("*.safetensors") for k, v in load(p.read_bytes()).items()}
    captions = set()
    for items, batch in zip(stream, loader(data, stream), strict=True):
        assert batch.positions == [p for p, _ in items] and batch.t_n.tolist() == [500] * 4
        for row, (_, index) in enumerate(items):
            entry = data.images[index]
            (caption,) = [c for c in entry["captions"] if batch.conditioning.pooled[row].equal(files[f"{c}.pooled"])]
            captions.add(caption)
            assert torch.equal(batch.x_n[row], files[entry["content"]])
            assert torch.equal(batch.conditioning.prompt_embeds[row], files[f"{caption}.embeds"])
            assert batch.conditioning.time_ids[row].tolist() == entry["time_ids"] == [64, 64, 0, 0, 64, 64]
    assert len(captions) == 7  # the picture with two captions has shown both
    assert batch.x_n.dtype == batch.conditioning.time_ids.dtype == torch.float32


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
