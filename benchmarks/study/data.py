"""The study's pictures: emoji of another artist than the miniature's own, none of them near anything that it was trained on.

The source is the npm archive of emoji-datasource-twitter 16.0.0 (Twemoji; images CC-BY 4.0, read here and not shipped). The
miniature learnt from Noto emoji. To learn Twemoji is thus to learn a style from few pictures, which is what people fine-tune
for. A picture stays out if one that the base model was trained on is near it, or if a relative is in already: one of each
family, so that no set holds near-duplicates and no held-out picture has a twin that was trained on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.miniature.data import Emoji, families, read_archive, read_emoji
from eval.embedders.registry import load_embedder
from eval.embedding import normalised
from eval.neighbours import nearest
from sdxl_ambient.errors import ImagesMissing

SIZES = (32, 128, 512)
HELDOUT = 512
TUNING = 64
NEAR = 0.8  # pixel similarity; above it the base model may know the picture


def features(emoji: list[Emoji]) -> np.ndarray:
    """Normalised features (n, d) of the evaluation's embedder ``pixel``."""
    embedder = load_embedder("pixel")
    pictures = [Image.fromarray((e.on_white() * 255).round().astype(np.uint8)) for e in emoji]
    prepared = [torch.stack([embedder.prepare(p) for p in pictures[i : i + 64]]) for i in range(0, len(pictures), 64)]
    return normalised(np.concatenate([embedder.encode(batch).numpy() for batch in prepared]))


def unrelated(emoji: list[Emoji], known: list[Emoji]) -> list[Emoji]:
    """One emoji of each family, without those near a picture in ``known``, in the order of a hash of their names."""
    emoji = sorted(emoji, key=lambda e: e.file_name)
    similarity = nearest(features(emoji), features(known), 1)[0][:, 0]
    first = {}
    for e, family, near in zip(emoji, families(emoji), similarity, strict=True):
        if near < NEAR:
            first.setdefault(family, e)
    # Salted: the miniature's own split goes by the bare hash, and would put what it was trained on into one set.
    return sorted(first.values(), key=lambda e: hashlib.sha256(f"study {e.file_name}".encode()).hexdigest())


def write_sets(archive: Path, pretrained_on: Path, folder: Path) -> dict[str, int]:
    """Write folder/{train_32,train_128,train_512,heldout,tuning}/, each train set a part of the next; returns their sizes.

    ``tuning`` is for what a run may look at: what it chooses by these pictures is not chosen by those it is judged by.

    Raises:
        ImagesMissing: too few pictures are left.
    """
    found = unrelated(read_archive(archive, "twitter"), read_emoji(pretrained_on))
    ends = np.cumsum([max(SIZES), HELDOUT, TUNING])
    if len(found) < ends[-1]:
        raise ImagesMissing(f"{archive}: {len(found)} pictures can be used, {ends[-1]} are needed")
    sets = {f"train_{n}": found[:n] for n in SIZES}
    sets |= {"heldout": found[ends[0] : ends[1]], "tuning": found[ends[1] : ends[2]]}
    for name, members in sets.items():
        _write(folder / name, members)
    return {name: len(members) for name, members in sets.items()}


def caption(emoji: Emoji) -> str:
    """Its code point: a different caption for each picture, of tokens that the base model was never taught."""
    return f"sticker {emoji.file_name.removesuffix('.png')}"


def _write(folder: Path, members: list[Emoji]) -> None:
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for e in members:
        (new / e.file_name).write_bytes(e.png)
    rows = [json.dumps({"file_name": e.file_name, "text": caption(e)}) for e in members]
    (new / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
