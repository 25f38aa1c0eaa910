"""Draws samples at a lower level from a store's noisy latents, and writes them as a store."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import UNet2DConditionModel
from tqdm import tqdm

from sdxl_ambient.devices import DTYPES
from sdxl_ambient.errors import ModelError, StoreError
from sdxl_ambient.images.geometry import Size, size_of
from sdxl_ambient.loop.settings import LoopSettings
from sdxl_ambient.models.denoiser import Denoiser
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.posterior import Denoise, ancestral_steps, spaced_times
from sdxl_ambient.provenance import atomic
from sdxl_ambient.randomness import Randomness, sample_generator
from sdxl_ambient.store.batches import collate
from sdxl_ambient.store.lineage import lowered
from sdxl_ambient.store.plan import shards
from sdxl_ambient.store.reader import LatentStore
from sdxl_ambient.store.records import Entry, Plan, Prompts
from sdxl_ambient.store.shards import Shard, look_at, write_latent_shard


def draw_lower(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_n: torch.Tensor,
    t_n: torch.Tensor,
    t_m: int,
    steps: int,
    randomness: Randomness,
) -> torch.Tensor:
    """A sample of p(x_m | x_n) for each row of ``x_n`` (batch, …): the reverse chain from t_n (batch,) down to exactly t_m.

    The times fall as :func:`sdxl_ambient.posterior.sample_posterior`'s do, quadratically: steps get shorter towards t_m.
    """
    times = spaced_times(t_n, torch.full_like(t_n, t_m), steps, power=2)
    return ancestral_steps(denoise, schedule, x_n, times, randomness)


@dataclass
class RestoredLatentMaker:
    """Makes a new store's latents of ``store``'s, the parent."""

    store: LatentStore
    unet: UNet2DConditionModel
    schedule: NoiseSchedule
    settings: LoopSettings

    def __post_init__(self):
        # Training draws one of an image's captions each time; its one sample is drawn given the first.
        self.store = copy.copy(self.store)
        self.store.images = [_first_caption(entry) for entry in self.store.images]
        self.index = {i["content"]: k for k, i in enumerate(self.store.images)}
        self.purpose = f"loop round {len(self.store.lineage) + 1}"  # no round draws the random numbers of another

    def batches(self, entries: Sequence[Entry]) -> Iterator[list[int]]:
        """The images of a shard that are restored, in the parent's numbers: those of one size, in forward passes."""
        groups: dict[Size, list[int]] = {}
        for entry in entries:
            index = self.index[entry["content"]]
            if lowered(self.store.images[index], self.settings.t_n):
                groups.setdefault(size_of(entry), []).append(index)
        for members in groups.values():
            for start in range(0, len(members), self.settings.batch_size):
                yield members[start : start + self.settings.batch_size]

    def restored(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """x_m (4, h, w) of some images, float32 on the CPU, by content.

        Raises:
            ModelError: the UNet gives NaN or infinity.
        """
        batch = collate([self.store[0, index] for index in indices])
        device, dtype = self.unet.device, DTYPES[self.settings.dtype]
        generators = [sample_generator(self.settings.seed, self.purpose, content) for content in batch.contents]
        x_m = draw_lower(
            Denoiser(self.unet, batch.conditioning.to(device, dtype), dtype),
            self.schedule,
            batch.x_n.to(device),
            batch.t_n,
            self.settings.t_n,
            self.settings.steps,
            Randomness(generators, len(indices)),
        )
        x_m = x_m.float().cpu()
        if not bool(torch.isfinite(x_m).all()):
            raise ModelError("the UNet gives values that are not finite; use --dtype bfloat16 or float32")
        return {content: x.clone() for content, x in zip(batch.contents, x_m, strict=True)}

    def taken_over(self, entries: Sequence[Entry]) -> dict[str, torch.Tensor]:
        """The latents of a shard that stay as they are."""
        kept = [i["content"] for i in entries if not lowered(self.store.images[self.index[i["content"]]], self.settings.t_n)]
        return {content: self.store[0, self.index[content]]["x_n"].contiguous() for content in kept}


def _first_caption(entry: Entry) -> Entry:
    entry = entry.copy()
    entry["captions"] = entry["captions"][:1]
    return entry


def whole(path: Path, names: Sequence[str]) -> bool:
    """Whether a shard is there. A damaged one is drawn again, which gives the same samples: they follow from the seed."""
    try:
        return look_at(path, names) is Shard.WHOLE
    except StoreError:
        return False


def missing_shards(output: Path, plan: Plan, state: PartialState) -> list[tuple[str, list[Entry]]]:
    """This process's share of the shards, those that aren't there yet."""
    share = shards(plan)[state.process_index :: state.num_processes]
    return [(name, entries) for name, entries in share if not whole(output / name, [i["content"] for i in entries])]


def write_samples(output: Path, todo: list[tuple[str, list[Entry]]], draw: RestoredLatentMaker, quiet: bool = False) -> None:
    """Make some shards, each written once it is whole."""
    total = sum(len(entries) for _, entries in todo)
    with tqdm(total=total, desc="restoring", unit="img", disable=quiet, mininterval=1) as bar:
        for name, entries in todo:
            tensors = draw.taken_over(entries)
            bar.update(len(tensors))
            for indices in draw.batches(entries):
                tensors |= draw.restored(indices)
                bar.update(len(indices))
            write_latent_shard(output / name, tensors)


def prompts_of(store: LatentStore) -> Prompts:
    """A store's captions, as its manifest has them."""
    prompts: Prompts = {"prompts": store.manifest["prompts"]}
    if tokens := store.manifest.get("tokens"):
        prompts["tokens"] = tokens
    return prompts


def share_texts(store: LatentStore, output: Path) -> None:
    """Give the new store its parent's captions, in links where the file system has them."""
    prompts = prompts_of(store)
    tokens = [prompts["tokens"]] if "tokens" in prompts else []
    for name in sorted({*prompts["prompts"].values(), *tokens}):
        with atomic(output / name) as temporary:
            try:
                os.link(store.folder / name, temporary)
            except OSError:
                shutil.copyfile(store.folder / name, temporary)
