"""A finished store as a data set: a latent, its level, a caption's embedding and the time ids for each item."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset
from tqdm import tqdm

from sdxl_ambient.errors import StoreError
from sdxl_ambient.images.geometry import Size, bucket_counts, mirrored, size_of
from sdxl_ambient.levels import CLEAN
from sdxl_ambient.provenance import hash_bytes, hash_json
from sdxl_ambient.randomness import sample_generator
from sdxl_ambient.store.lineage import lineage_of, observed_levels, public_lineage
from sdxl_ambient.store.plan import shards
from sdxl_ambient.store.records import Entry, Manifest
from sdxl_ambient.store.shards import check_shard, tensor_hash
from sdxl_ambient.store.validate import read_manifest

EMPTY = hash_bytes(b"")  # the caption of a sample that is shown without one
MAXIMUM_OPEN = 64  # shards that a process keeps open


@dataclass(frozen=True)
class Presentation:
    """How pictures are shown. What is drawn follows from ``seed`` and the position in the stream."""

    seed: int = 0
    random_flip: bool = False  # half of them are mirrored
    empty_prompts: float = 0.0  # the part that is shown without its caption
    zero_empty: bool = True  # that is as zeros, as SDXL's own pipeline has it, else as the embedding of ""


class Item(TypedDict):
    """A sample: its noisy latent (4, h, w) and level, −1 for clean, and how its picture is shown."""

    x_n: torch.Tensor
    t_n: int
    embeds: torch.Tensor
    pooled: torch.Tensor
    time_ids: list[int]
    position: int
    content: str
    tokens: torch.Tensor | None
    dropped: bool
    flipped: bool


class LatentStore(Dataset[Item]):
    """A finished store of noisy latents. An item's index is (position in the stream, number of the picture).

    ``lineage`` has a round for each time that its latents were restored (:mod:`sdxl_ambient.loop`), and is empty where they
    are observations; ``observed`` has the level that each picture was observed at, by content, which after a round is not
    the latent's own.

    Raises:
        StoreError: unfinished, damaged, of another format, or without what ``presentation`` needs.
    """

    def __init__(self, folder: str | Path, limit: int | None = None, presentation: Presentation | None = None):
        self.folder, self.presentation = Path(folder), presentation or Presentation()
        self.manifest: Manifest = read_manifest(self.folder)
        self.images: list[Entry] = self.manifest["images"][:limit]
        self._file_of = {i["content"]: name for name, entries in shards(self.manifest) for i in entries}
        self._prompts, self._tokens = self.manifest["prompts"], self.manifest.get("tokens")
        self._hashes = self.manifest["sha256"]
        self.observed = observed_levels(self.manifest)
        self.lineage = lineage_of(self.manifest)
        self._verified = False
        self._check_presentation()
        self._open: OrderedDict[str, Any] = OrderedDict()  # safetensors' own handles

    def _check_presentation(self) -> None:
        if self.presentation.empty_prompts and not self.presentation.zero_empty and EMPTY not in self._prompts:
            raise StoreError(
                f"{self.folder} was made by an earlier version, without the empty prompt; run again with the images"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getstate__(self) -> dict:
        # Open files do not travel to a worker process.
        return {**self.__dict__, "_open": OrderedDict()}

    def presented(self, presentation: Presentation) -> LatentStore:
        """The same store, its pictures shown in another way."""
        other = copy.copy(self)
        other.presentation, other._open = presentation, OrderedDict()
        other._check_presentation()
        return other

    @property
    def hash(self) -> str:
        """Identifies the store in artefacts: a hash of its plan, which says nothing of the noise."""
        own = [i["t_n"] for i in self.manifest["images"]]
        uniform = set(own) == {self.manifest["fingerprint"]["latent"]["t_n"]}
        contents = [i["content"] for i in self.manifest["images"]]
        restored = [self.public_lineage, [self.observed[c] for c in contents]] if self.lineage else []
        return hash_json([self.manifest["fingerprint"], contents, *([] if uniform else [own]), *restored])

    @property
    def public_lineage(self) -> list[dict[str, Any]]:
        """``lineage`` as artefacts that are shared have it: without the key's id."""
        return public_lineage(self.lineage)

    @property
    def schedule_hash(self) -> str:
        """The noise schedule that the latents were made with."""
        return self.manifest["fingerprint"]["latent"]["schedule"]

    @cached_property
    def groups(self) -> dict[Size, list[int]]:
        """Indices of the pictures of each size in pixels, since a batch holds one size."""
        groups: dict[Size, list[int]] = {size: [] for size in bucket_counts(self.images)}
        for index, entry in enumerate(self.images):
            groups[size_of(entry)].append(index)
        return groups

    def _file(self, name: str) -> Any:
        """A shard, kept open; of many the least recently used one is closed."""
        if name not in self._open:
            self._open[name] = safe_open(str(self.folder / name), "pt")
            if len(self._open) > MAXIMUM_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        return self._open[name]

    def _tensor(self, file: str, name: str) -> torch.Tensor:
        try:
            tensor = self._file(file).get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{self.folder / file} is damaged: {error}") from None
        if not self._verified and tensor_hash(name, tensor) != self._hashes[file].get(name):
            raise StoreError(f"{self.folder / file} is damaged: the tensor {name[:12]} is not as it was written")
        return tensor

    def verify(self, part: int = 0, parts: int = 1, *, quiet: bool = False) -> None:
        """Check every bit of the store's tensors, in threads; of ``parts`` processes, each its own.

        Without it each tensor is checked whenever it is read, which costs as much again at every pass.

        Raises:
            StoreError: naming the file that is damaged.
        """
        files = sorted(self._hashes.items())[part::parts]
        size_in = {i["content"]: size_of(i) for i in self.manifest["images"]}
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            done = pool.map(lambda file: check_shard(self.folder / file[0], file[1], size_in), files)
            for _ in tqdm(done, "checking shards", len(files), unit="shard", disable=quiet, mininterval=1, delay=1):
                pass
        self._verified = True

    def __getitem__(self, index: tuple[int, int]) -> Item:
        position, number = index
        entry = self.images[number]
        caption, dropped, flipped = self._drawn(entry["captions"], position)
        file = self._prompts[caption]
        x_n = self._tensor(self._file_of[entry["content"]], entry["content"])
        embeds, pooled = self._tensor(file, f"{caption}.embeds"), self._tensor(file, f"{caption}.pooled")
        if dropped and self.presentation.zero_empty:
            embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
        tokens = self._tensor(self._tokens, f"{EMPTY if dropped else caption}.tokens") if self._tokens else None
        return {
            # The stored latent is mirrored: a mirrored picture that is observed anew would be a second observation.
            "x_n": x_n.flip(-1) if flipped else x_n,
            "t_n": CLEAN if entry["t_n"] is None else entry["t_n"],
            "embeds": embeds,
            "pooled": pooled,
            "time_ids": mirrored(entry["time_ids"]) if flipped else entry["time_ids"],
            "position": position,
            "content": entry["content"],
            "tokens": tokens,
            "dropped": dropped,
            "flipped": flipped,
        }

    def _drawn(self, captions: list[str], position: int) -> tuple[str, bool, bool]:
        """How the sample at a position is shown: the caption whose embedding is read, whether it is shown without one, and
        whether it is mirrored. Nothing is drawn that isn't needed."""
        settings = self.presentation
        if len(captions) == 1 and not settings.empty_prompts and not settings.random_flip:
            return captions[0], False, False
        generator = sample_generator(settings.seed, "shown", position)
        several = len(captions) > 1
        caption = captions[int(torch.randint(len(captions), (), generator=generator))] if several else captions[0]
        dropped = bool(settings.empty_prompts) and float(torch.rand((), generator=generator)) < settings.empty_prompts
        flipped = settings.random_flip and float(torch.rand((), generator=generator)) < 0.5
        return EMPTY if dropped and not settings.zero_empty else caption, dropped, flipped
