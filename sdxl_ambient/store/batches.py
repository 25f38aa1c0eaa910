"""Stored latents → batches, in an order that depends on nothing but the seed.

The training data is one endless stream of samples: each epoch is a permutation of the store drawn from (seed, epoch), and
one epoch follows the other without a gap. Micro-step k of a run takes the next ``batch × processes`` positions. So a step's
data, its noise and its times follow from the step's number alone: a resume needs no replay, and the stream is the same for
every number of processes that gives the same global batch.

Pictures of several sizes are several such streams, one per size, and every step takes its whole batch from one of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Sampler

from sdxl_ambient.images.geometry import Size
from sdxl_ambient.models.denoiser import Conditioning
from sdxl_ambient.randomness import sample_generator
from sdxl_ambient.store.reader import Item, LatentStore

_SMALL = ("t_n", "tokens", "dropped", "flipped")  # what of a batch travels as arrays


@dataclass
class Batch:
    """Samples of a store, b of them."""

    x_n: torch.Tensor  # (b, 4, h, w) noisy latents
    t_n: torch.Tensor  # (b,) their levels, −1 for clean
    conditioning: Conditioning  # what they show
    positions: list[int]  # in the stream; they seed each sample's noise and time
    contents: list[str]  # hashes that name the pictures
    dropped: torch.Tensor  # (b,) bool: shown without its caption
    flipped: torch.Tensor  # (b,) bool: mirrored
    tokens: torch.Tensor | None = None  # (b, 2, 77) of the captions for both text encoders, where the store has them

    def __getstate__(self) -> dict:
        # From a worker each tensor comes through a file of its own, arrays come all at once: the small ones are arrays.
        arrays = {name: x.numpy() for name in _SMALL if (x := getattr(self, name)) is not None}
        embeds, pooled, time_ids = (getattr(self.conditioning, name) for name in ("prompt_embeds", "pooled", "time_ids"))
        return {**self.__dict__, **arrays, "conditioning": (embeds, pooled, time_ids.numpy())}

    def __setstate__(self, state: dict) -> None:
        tensors = {name: torch.from_numpy(x) for name in _SMALL if (x := state[name]) is not None}
        embeds, pooled, time_ids = state["conditioning"]
        conditioning = Conditioning(embeds, pooled, torch.from_numpy(time_ids))
        self.__dict__.update({**state, **tensors, "conditioning": conditioning})

    def first(self, count: int) -> Batch:
        """Its first samples."""
        rows = slice(count)
        return Batch(
            self.x_n[rows],
            self.t_n[rows],
            self.conditioning.rows(rows),
            self.positions[rows],
            self.contents[rows],
            self.dropped[rows],
            self.flipped[rows],
            None if self.tokens is None else self.tokens[rows],
        )

    def generators(self, seed: int) -> list[torch.Generator]:
        """One CPU generator per sample, seeded by (seed, position in the stream)."""
        return [sample_generator(seed, "train", p) for p in self.positions]


def small_groups(groups: Mapping[Size, Sequence[int]], batch_size: int) -> list[str]:
    """One line for every size with fewer pictures than a global batch, ``batch_size``, which then shows some of them more
    than once. A store of one size has no such line."""
    few = {size: len(members) for size, members in groups.items() if len(members) < batch_size}
    return [
        f"note: {count} pictures of {height} x {width} pixels are fewer than the {batch_size} of a batch, which repeats them"
        for (height, width), count in few.items()
        if len(groups) > 1
    ]


def collate(items: Sequence[Item]) -> Batch:
    """Items of a :class:`LatentStore` → :class:`Batch`."""
    tokens = [i["tokens"] for i in items if i["tokens"] is not None]
    return Batch(
        x_n=torch.stack([i["x_n"] for i in items]),
        t_n=torch.tensor([i["t_n"] for i in items]),
        conditioning=Conditioning(
            torch.stack([i["embeds"] for i in items]),
            torch.stack([i["pooled"] for i in items]),
            torch.tensor([i["time_ids"] for i in items], dtype=torch.float32),
        ),
        positions=[i["position"] for i in items],
        contents=[i["content"] for i in items],
        tokens=torch.stack(tokens) if tokens else None,
        dropped=torch.tensor([i["dropped"] for i in items]),
        flipped=torch.tensor([i["flipped"] for i in items]),
    )


class Stream(Sampler):
    """This process's batches of (position, index), from micro-step ``start`` to before ``stop``.

    ``size`` pictures: all of a store, or those in ``groups``, the pictures of each size. Streams of different ``purpose``
    have different orders.

    With G samples in a global batch, epoch e holds ⌊(e+1) n/G⌋ − ⌊e n/G⌋ batches of a group of n pictures, so that every
    picture is shown equally often in the long run; which group comes when is drawn for each epoch. A group is an endless
    stream of its own, of which its j-th batch takes places j·G to (j+1)·G − 1.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        *,
        start: int = 0,
        stop: int,
        rank_and_size: tuple[int, int] = (0, 1),
        groups: Iterable[Sequence[int]] | None = None,
        purpose: str = "order",
    ):
        self.groups = [range(size)] if groups is None else list(groups)
        assert sum(map(len, self.groups)) == size and all(self.groups)
        self.size, self.batch_size, self.seed, self.purpose = size, batch_size, seed, purpose
        self.start, self.stop = start, stop
        self.rank, self.processes = rank_and_size
        self._orders: dict[int, tuple[int, list[int]]] = {}
        self._epoch: tuple[int, int, list[tuple[int, int]]] = (-1, 0, [])

    def __len__(self) -> int:
        return self.stop - self.start

    def index(self, group: int, place: int) -> int:
        """The picture at a place of a group's endless stream."""
        members = self.groups[group]
        epoch, within = divmod(place, len(members))
        if self._orders.get(group, (-1, []))[0] != epoch:
            purpose = self.purpose if len(self.groups) == 1 else f"{self.purpose} of group {group}"
            generator = sample_generator(self.seed, purpose, epoch)
            self._orders[group] = epoch, torch.randperm(len(members), generator=generator).tolist()
        return members[self._orders[group][1][within]]

    def _before(self, epoch: int) -> list[int]:
        """How many global batches of each group there are before an epoch."""
        return [epoch * len(members) // (self.batch_size * self.processes) for members in self.groups]

    def _first(self, epoch: int) -> int:
        """The micro-step that an epoch begins with."""
        return sum(self._before(epoch))

    def batch(self, step: int) -> tuple[int, int]:
        """Which group the global batch of a micro-step is from, and which of that group's batches it is."""
        if len(self.groups) == 1:
            return 0, step
        epoch, first, batches = self._epoch
        if not first <= step < first + len(batches):
            # By the end of this epoch every group has had enough batches, whatever the rounding took from it.
            last = (step + 1 + len(self.groups)) * self.batch_size * self.processes // self.size + 1
            epoch = bisect_right(range(last + 1), step, key=self._first) - 1
            first, batches = self._first(epoch), self._batches(epoch)
            self._epoch = epoch, first, batches
        return batches[step - first]

    def _batches(self, epoch: int) -> list[tuple[int, int]]:
        """The global batches of an epoch, in their order, as :meth:`batch` gives them."""
        spans = [range(*span) for span in zip(self._before(epoch), self._before(epoch + 1), strict=True)]
        groups = [group for group, span in enumerate(spans) for _ in span]
        generator = sample_generator(self.seed, f"{self.purpose} buckets", epoch)
        drawn = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
        # Which group comes next is drawn; each group's own batches come in their order.
        upcoming = [iter(span) for span in spans]
        return [(group, next(upcoming[group])) for group in drawn]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            group, batch = self.batch(step)
            offset = self.rank * self.batch_size
            position, place = (k * self.processes * self.batch_size + offset for k in (step, batch))
            yield [(position + i, self.index(group, place + i)) for i in range(self.batch_size)]


def loader(store: LatentStore, stream: Stream, workers: int = 0) -> DataLoader:
    """Batches of a store in a stream's order. Not for Accelerate to prepare: the stream already is this process's share."""
    return DataLoader(store, batch_sampler=stream, collate_fn=collate, num_workers=workers, generator=torch.Generator())
