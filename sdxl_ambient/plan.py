"""What a store of noisy latents will hold, decided before anything is drawn, and what speaks against drawing it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm

from sdxl_ambient.conditioning import time_ids
from sdxl_ambient.geometry import Geometry
from sdxl_ambient.images import ImageError, Record, load_rgb
from sdxl_ambient.manifest import differences, hash_bytes, hash_json, hash_tensors, read_json
from sdxl_ambient.models import Encoders
from sdxl_ambient.noise import NoiseSchedule

FORMAT_VERSION = 1


class StoreError(ValueError):
    """A store that is damaged, or differs from what is asked for. The message is one line that says in what."""


def content_hash(image: Image.Image) -> str:
    """SHA-256 of an RGB picture's size and pixels: the same for copies whose files differ."""
    return hash_bytes(f"{image.width}x{image.height}|".encode() + image.tobytes())


# -- the plan ----------------------------------------------------------------------


@dataclass(frozen=True)
class Scanned:
    """One usable picture: content hash, (height, width) in pixels, caption, and where it lies."""

    content: str
    size: tuple[int, int]
    caption: str
    path: str


def scan(records: Sequence[Record], instance_prompt: str | None, state: PartialState) -> tuple[list[Scanned], list[dict]]:
    """Open every picture once, each process its share. Returns the usable ones and ``{"file", "reason"}`` for the others."""
    found, skipped = [], []
    mine = range(state.process_index, len(records), state.num_processes)
    for i in tqdm(mine, desc="reading images", unit="img", disable=not state.is_main_process, mininterval=1):
        record = records[i]
        caption = record.caption or instance_prompt
        try:
            if not caption:
                raise ImageError("no caption (metadata.jsonl, a .txt file beside it, or --instance_prompt)")
            image = load_rgb(record.path)
            found.append((i, Scanned(content_hash(image), (image.height, image.width), caption, str(record.path))))
        except ImageError as error:
            skipped.append((i, {"file": record.path.name, "reason": str(error)}))
    if state.num_processes > 1:
        found, skipped = gather_object(found), gather_object(skipped)
    return [s for _, s in sorted(found, key=lambda p: p[0])], [s for _, s in sorted(skipped, key=lambda p: p[0])]


def hash_tokenizer(tokenizer) -> str:
    """SHA-256 over everything that makes a text's tokens, and the length they are cut to."""
    if not tokenizer.is_fast:
        return hash_json([sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length])
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # A tokenizer remembers the padding and truncation of its last call, which say nothing of what it is.
    state = {name: value for name, value in state.items() if name not in ("padding", "truncation")}
    return hash_json([state, tokenizer.model_max_length])


def fingerprint(encoders: Encoders, schedule: NoiseSchedule, geometry: Geometry, t_n: int | None) -> dict:
    """Everything but the pictures that a store depends on. ``latent`` shapes the noisy latents, ``text`` the embeddings."""
    return {
        "format_version": FORMAT_VERSION,
        "latent": {
            "vae": hash_tensors(encoders.vae.state_dict()),
            "scaling_factor": encoders.vae.config.scaling_factor,
            "schedule": schedule.hash,
            "resolution": geometry.resolution,
            "center_crop": geometry.center_crop,
            "t_n": t_n,
        },
        "text": {
            "tokenizers": [hash_tokenizer(t) for t in encoders.tokenizers],
            "text_encoders": [hash_tensors(e.state_dict()) for e in encoders.text_encoders],
        },
    }


def make_plan(marks: dict, pictures: Sequence[Scanned], geometry: Geometry, shard_size: int) -> dict:
    """What will be drawn: one entry per distinct picture, in the order of their hashes, with its files' captions."""
    by_content: dict[str, dict] = {}
    for p in pictures:
        entry = by_content.setdefault(
            p.content,
            {
                "content": p.content,
                "time_ids": time_ids(p.size, geometry.place(p.size, p.content)[1], (geometry.resolution,) * 2),
                "t_n": marks["latent"]["t_n"],
                "captions": [],
            },
        )
        key = hash_bytes(p.caption.encode())
        if key not in entry["captions"]:
            entry["captions"].append(key)
    images = [by_content[c] for c in sorted(by_content)]
    return {"fingerprint": marks, "shard_size": shard_size, "images": images}


def shards(plan: dict) -> list[tuple[str, list[dict]]]:
    """File name and entries of every latent shard."""
    size, images = plan["shard_size"], plan["images"]
    return [(f"latents-{k // size:05d}.safetensors", images[k : k + size]) for k in range(0, len(images), size)]


# -- refusing ----------------------------------------------------------------------


def compare(stored: dict, wanted: dict) -> list[str]:
    """In what a stored plan differs from a wanted one, captions aside (they can change without a new draw)."""
    found = differences(stored["fingerprint"], wanted["fingerprint"])
    have, want = ({i["content"] for i in plan["images"]} for plan in (stored, wanted))
    if have != want:
        found.append(f"images: {len(want - have)} are not in the store, {len(have - want)} are in the store only")
    return found


def observed_elsewhere(output_dir: Path, plan: dict) -> tuple[Path, int] | None:
    """Another noisy store beside ``output_dir`` with other noise for pictures of this plan: its folder, and how many.

    The same settings under the same key file are the same noise, and no second observation.
    """
    wanted, key_id = {i["content"] for i in plan["images"]}, plan.get("key_id")
    for path in sorted(output_dir.resolve().parent.glob("*/plan.json")):
        if path.parent == output_dir.resolve():
            continue
        try:
            other = read_json(path)
            shared = wanted & {i["content"] for i in other["images"] if i["t_n"] is not None}
            same_key = key_id is not None and other.get("key_id") == key_id
            rebuild = same_key and other["fingerprint"]["latent"] == plan["fingerprint"]["latent"]
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            continue  # not one of ours
        if shared and not rebuild:
            return path.parent, len(shared)
    return None


SECOND = (
    "Each independent draw of the noise is one more observation of the same picture, and their average has less noise than "
    "t_n promises"
)


def check_first_observation(output_dir: Path, plan: dict, allowed: bool, warn) -> None:
    """Refuse to draw noise for pictures of which a neighbouring store already holds another draw."""
    if plan["fingerprint"]["latent"]["t_n"] is None:
        return
    other = observed_elsewhere(output_dir, plan)
    if other is None:
        return
    message = f"{other[1]} of these images already have a noisy latent in {other[0]}. {SECOND}"
    if not allowed:
        raise StoreError(f"{message}. Use that store, or give --allow_second_observation")
    warn(f"warning: {message}; going on, as --allow_second_observation asks")


def remove_store(folder: Path) -> None:
    """Delete a store's own files and no others. The plan goes last: latents without it would be taken for another plan's."""
    for pattern in ("manifest.json", "latents-*.safetensors", "prompts-*.safetensors", "plan.json"):
        for path in folder.glob(pattern):
            path.unlink()


def settle_plan(output_dir: Path, wanted: dict, allowed: bool, warn) -> dict:
    """The plan to follow: the stored one if it agrees, else the wanted one; a store that differs is refused.

    Raises:
        StoreError: naming what differs.
    """
    path = output_dir / "plan.json"
    if path.exists():
        try:
            stored = read_json(path)
            found = compare(stored, wanted)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{path} is damaged ({error}); what the store holds can't be told. Restore the file") from None
        if not found:
            # The shards keep their layout; captions follow what is asked for. A store of several keys has no id.
            key_id = wanted["key_id"] if stored.get("key_id") == wanted["key_id"] else None
            return {**wanted, "shard_size": stored["shard_size"], "key_id": key_id}
        if not allowed:
            raise StoreError(
                f"the store {output_dir} is of something else ({'; '.join(found)}). Use another folder, or give "
                "--allow_second_observation to draw it anew"
            )
        warn(f"warning: the store {output_dir} differs ({'; '.join(found)}) and is drawn anew. {SECOND}")
        remove_store(output_dir)
    elif any(output_dir.glob("latents-*.safetensors")):
        raise StoreError(f"{output_dir} holds latents but no plan.json, so what they are can't be told; use another folder")
    else:
        check_first_observation(output_dir, wanted, allowed, warn)
    return wanted
