"""What a store will hold, decided before anything is drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence

from sdxl_ambient.errors import StoreError
from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.images.load import Record
from sdxl_ambient.levels import CLEAN
from sdxl_ambient.models.conditioning import time_ids
from sdxl_ambient.models.load import Encoders
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.provenance import hash_bytes, hash_json, hash_tensors
from sdxl_ambient.store.records import Entry, Fingerprint, LatentSettings, Plan, TextSettings
from sdxl_ambient.store.scan import Scanned

FORMAT_VERSION = 2
TOKENS = "tokens.safetensors"


def hash_tokenizer(tokenizer) -> str:
    """SHA-256 over everything that makes a text's tokens, and the length they are cut to."""
    if not tokenizer.is_fast:
        return hash_json([sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length])
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # A tokenizer remembers the padding and truncation of its last call, which say nothing of what it is.
    state = {name: value for name, value in state.items() if name not in ("padding", "truncation")}
    return hash_json([state, tokenizer.model_max_length])


def fingerprint(encoders: Encoders, schedule: NoiseSchedule, geometry: Geometry, t_n: int | None) -> Fingerprint:
    """Everything but the pictures that a store depends on. ``latent`` shapes the noisy latents, ``text`` the embeddings."""
    latent: LatentSettings = {
        "vae": hash_tensors(encoders.vae.state_dict()),
        "scaling_factor": encoders.vae.config["scaling_factor"],
        "schedule": schedule.hash,
        "resolution": geometry.resolution,
        "center_crop": geometry.center_crop,
        "t_n": t_n,
    }
    if geometry.buckets:
        # Only where there are any: the noise is made from these settings, and stores without buckets keep theirs.
        latent["buckets"] = [list(size) for size in geometry.buckets]
    return {"format_version": FORMAT_VERSION, "latent": latent, "text": fingerprint_of_text(encoders)}


def fingerprint_of_text(encoders: Encoders) -> TextSettings:
    """What the embeddings of captions depend on."""
    return {
        "tokenizers": [hash_tokenizer(t) for t in encoders.tokenizers],
        "text_encoders": [hash_tensors(e.state_dict()) for e in encoders.text_encoders],
    }


def make_plan(marks: Fingerprint, pictures: Sequence[Scanned], geometry: Geometry, shard_size: int) -> Plan:
    """What will be drawn: one entry per distinct picture, in the order of their hashes, with its files' captions."""

    def placed(p: Scanned) -> list[int]:
        return time_ids(p.size, geometry.place(p.size, p.content)[1], geometry.target(p.size))

    return plan_of(marks, pictures, placed, shard_size)


def plan_of(marks: Fingerprint, pictures: Sequence[Scanned], ids: Callable[[Scanned], list[int]], shard_size: int) -> Plan:
    """A plan with the time ids that ``ids`` gives.

    Raises:
        StoreError: copies of one picture at different noise levels.
    """
    by_content: dict[str, Entry] = {}
    first: dict[str, Scanned] = {}
    for p in pictures:
        t_n = own_level(p.record, marks["latent"]["t_n"])
        entry = by_content.get(p.content)
        if entry is None:
            entry = by_content[p.content] = {"content": p.content, "time_ids": ids(p), "t_n": t_n, "captions": []}
            first[p.content] = p
        elif entry["t_n"] != t_n:
            one, other = (CLEAN if t is None else t for t in (entry["t_n"], t_n))
            raise StoreError(
                f"{first[p.content].record.name} and {p.record.name} are the same picture at different noise levels, t_n = "
                f"{one} and {other}; give both one level"
            )
        keys = (hash_bytes(caption.encode()) for caption in p.record.captions)
        entry["captions"] += [k for k in dict.fromkeys(keys) if k not in entry["captions"]]
    images = [by_content[c] for c in sorted(by_content)]
    return {"fingerprint": marks, "shard_size": shard_size, "images": images}


def own_level(record: Record, t_n: int | None) -> int | None:
    """A record's noise level, or the set's where it has none of its own; None for clean."""
    level = t_n if record.t_n is None else record.t_n
    return None if level == CLEAN else level


def latent_hash_of(latent: LatentSettings, entry: Entry) -> str:
    """What a picture's latent is, as a hash: VAE, schedule, the picture's size, its crop and the size it is brought to.

    The noise path and the register of observations go by it. The level isn't in it.
    """
    settings = {name: latent.get(name) for name in ("vae", "scaling_factor", "schedule")}
    return hash_json({**settings, "time_ids": entry["time_ids"]})


def shards(plan: Plan) -> list[tuple[str, list[Entry]]]:
    """File name and entries of every latent shard, in the order of their names."""
    found: dict[str, list[Entry]] = {}
    for entry in plan["images"]:
        found.setdefault(entry["shard"], []).append(entry)  # pyright: ignore[reportTypedDictNotRequiredAccess] - placed
    return sorted(found.items())


def place(entries: Sequence[Entry], size: int, known: Mapping[str, str] | None = None, first: int = 0) -> list[Entry]:
    """The entries with the shard of each: the known one of its content, or new ones of ``size``, numbered from ``first``."""
    known, placed, new = known or {}, [], 0
    for entry in entries:
        shard = known.get(entry["content"])
        if shard is None:
            shard, new = shard_name(first + new // size), new + 1
        placed.append({**entry, "shard": shard})
    return placed


def shard_name(number: int) -> str:
    return f"latents-{number:05d}.safetensors"


def shard_number(name: str) -> int | None:
    """The number of a shard by its file's name; None for another file."""
    match = re.fullmatch(r"latents-([0-9]{5,9})\.safetensors", name)
    return int(match[1]) if match else None
