"""What a store of noisy latents will hold, decided before anything is drawn, and what speaks against drawing it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm

from sdxl_ambient.conditioning import time_ids
from sdxl_ambient.duplicates import fingerprint as perceptual
from sdxl_ambient.geometry import Geometry
from sdxl_ambient.images import ImageError, Record, load_rgb
from sdxl_ambient.manifest import differences, hash_bytes, hash_json, hash_tensors, read_json
from sdxl_ambient.models import Encoders
from sdxl_ambient.noise import CLEAN, NoiseSchedule

FORMAT_VERSION = 1
TOKENS = "tokens.safetensors"


class StoreError(ValueError):
    """A store that is damaged, or differs from what is asked for. The message is one line that says in what."""


def content_hash(image: Image.Image) -> str:
    """SHA-256 of an RGB picture's size and pixels: the same for copies whose files differ."""
    return hash_bytes(f"{image.width}x{image.height}|".encode() + image.tobytes())


# -- the plan ----------------------------------------------------------------------


@dataclass(frozen=True)
class Scanned:
    """One usable picture: content hash, (height, width) in pixels, its record with the captions that it is shown with, and
    its perceptual fingerprint (400 bytes) where that was asked for."""

    content: str
    size: tuple[int, int]
    record: Record
    print: bytes | None = None

    @property
    def caption(self) -> str:
        """Its first caption."""
        return self.record.captions[0]


Look = Callable[[Record], tuple[str, tuple[int, int], bytes | None]]


def look(record: Record) -> tuple[str, tuple[int, int], None]:
    """Content hash and (height, width) of a picture. Raises ImageError."""
    image = load_rgb(record.read())
    return content_hash(image), (image.height, image.width), None


def look_closely(record: Record) -> tuple[str, tuple[int, int], bytes]:
    """The same with its perceptual fingerprint."""
    image = load_rgb(record.read())
    return content_hash(image), (image.height, image.width), perceptual(image).astype(np.uint8).tobytes()


def scan(
    records: Sequence[Record],
    instance_prompt: str | None,
    state: PartialState,
    look: Look = look,
    check: Callable[[], None] = lambda: None,
) -> tuple[list[Scanned], list[dict]]:
    """Open every picture once, each process its share. Returns the usable ones and ``{"file", "reason"}`` for the others.

    Records stay where they are: all processes have the same ones. ``check`` is called before each, and may raise.
    """
    found, skipped = [], []
    mine = range(state.process_index, len(records), state.num_processes)
    for i in tqdm(mine, desc="reading images", unit="img", disable=not state.is_main_process, mininterval=1):
        check()
        try:
            if not records[i].captioned(instance_prompt).captions:
                raise ImageError("no caption (a metadata file, a .txt file beside it, a column, or --instance_prompt)")
            found.append((i, look(records[i])))
        except ImageError as error:
            skipped.append((i, {"file": records[i].name, "reason": str(error)}))
    if state.num_processes > 1:
        found, skipped = gather_object(found), gather_object(skipped)
    usable = [
        Scanned(content, size, records[i].captioned(instance_prompt), mark)
        for i, (content, size, mark) in sorted(found, key=lambda p: p[0])
    ]
    return usable, [s for _, s in sorted(skipped, key=lambda p: p[0])]


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
    latent = {
        "vae": hash_tensors(encoders.vae.state_dict()),
        "scaling_factor": encoders.vae.config.scaling_factor,
        "schedule": schedule.hash,
        "resolution": geometry.resolution,
        "center_crop": geometry.center_crop,
        "t_n": t_n,
    }
    if geometry.buckets:
        # Only where there are any: the noise is made from these settings, and stores without buckets keep theirs.
        latent["buckets"] = [list(size) for size in geometry.buckets]
    return {"format_version": FORMAT_VERSION, "latent": latent, "text": fingerprint_of_text(encoders)}


def fingerprint_of_text(encoders: Encoders) -> dict:
    """What the embeddings of captions depend on."""
    return {
        "tokenizers": [hash_tokenizer(t) for t in encoders.tokenizers],
        "text_encoders": [hash_tensors(e.state_dict()) for e in encoders.text_encoders],
    }


def make_plan(marks: dict, pictures: Sequence[Scanned], geometry: Geometry, shard_size: int) -> dict:
    """What will be drawn: one entry per distinct picture, in the order of their hashes, with its files' captions."""

    def placed(p: Scanned) -> list[int]:
        return time_ids(p.size, geometry.place(p.size, p.content)[1], geometry.target(p.size))

    return plan_of(marks, pictures, placed, shard_size)


def plan_of(marks: dict, pictures: Sequence[Scanned], ids: Callable[[Scanned], list[int]], shard_size: int) -> dict:
    """A plan with the time ids that ``ids`` gives.

    Raises:
        StoreError: copies of one picture at different noise levels.
    """
    by_content: dict[str, dict] = {}
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


def shards(plan: dict) -> list[tuple[str, list[dict]]]:
    """File name and entries of every latent shard."""
    size, images = plan["shard_size"], plan["images"]
    return [(f"latents-{k // size:05d}.safetensors", images[k : k + size]) for k in range(0, len(images), size)]


# -- restored samples ----------------------------------------------------------------------
# A store that sdxl_ambient.loop made holds samples that a model drew given noisy latents, and says so: ``restored`` is the
# chain of its rounds, and every entry has the level that its picture was observed at, ``observed_t_n``.


def rounds(plan: dict) -> list[dict]:
    """How a store's latents were restored, a link for each round, the oldest first; [] for observations."""
    return plan.get("restored") or []


def observed_levels(plan: dict) -> dict[str, int | None]:
    """The noise level of each picture's one observation, by content; None for clean. Restoring lowers none of them."""
    name = "observed_t_n" if rounds(plan) else "t_n"
    return {i["content"]: i[name] for i in plan["images"]}


def restored_levels(folder: Path) -> dict[str, int | None] | None:
    """:func:`observed_levels` of the store of restored samples that a folder is, finished or not; None for all others."""
    for name in ("plan.json", "manifest.json"):
        try:
            plan = read_json(folder / name)
            if rounds(plan):
                return observed_levels(plan)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not there, or not one of ours
    return None


def spoken_levels(levels: Iterable[int | None]) -> str:
    """Noise levels as a message names them, the lowest first."""
    found = sorted({CLEAN if t is None else t for t in levels})
    names = ["none" if t == CLEAN else str(t) for t in found]
    return ", ".join(names) if len(names) < 5 else f"{names[0]} to {names[-1]} ({len(names)} levels)"


def refuse_restored(option: str, folder: str | Path) -> None:
    """Raises StoreError where images or noisy latents are looked for in a store of restored samples."""
    found = restored_levels(Path(folder))
    if found is not None:
        raise StoreError(
            f"--{option}: {str(folder)!r} is a store of restored samples, drawn by a model from observations at t_n = "
            f"{spoken_levels(found.values())}, and no source of observations; train on it with --latents_dir"
        )


# -- refusing ----------------------------------------------------------------------


def compare(stored: dict, wanted: dict) -> list[str]:
    """In what a stored plan differs from a wanted one, captions aside (they can change without a new draw)."""
    found = differences(stored["fingerprint"], wanted["fingerprint"])
    have, want = ({i["content"]: i["t_n"] for i in plan["images"]} for plan in (stored, wanted))
    if have.keys() != want.keys():
        more, less = want.keys() - have.keys(), have.keys() - want.keys()
        found.append(f"images: {len(more)} are not in the store, {len(less)} are in the store only")
    moved = [c for c in sorted(have.keys() & want.keys()) if have[c] != want[c]]
    if moved:
        levels = f"stored {have[moved[0]]}, wanted {want[moved[0]]}"
        found.append(f"noise levels: {len(moved)} images have another t_n, the first: {levels}")
    return found


def observed_elsewhere(output_dir: Path, plan: dict) -> tuple[Path, int] | None:
    """Another noisy store beside ``output_dir`` with other noise for pictures of this plan: its folder, and how many.

    The same settings and noise levels under the same key file are the same noise, and no second observation. A store of
    restored samples stands for the observations that they were drawn from, which may lie elsewhere or be gone.
    """
    wanted, key_id = _noisy(plan), plan.get("key_id")
    for path in sorted(output_dir.resolve().parent.glob("*/plan.json")):
        if path.parent == output_dir.resolve():
            continue
        try:
            other = read_json(path)
            theirs = _noisy(other)
            shared = wanted.keys() & theirs.keys()
            first = (rounds(other) or [other])[0]  # who knows the key of the observations
            same_key = key_id is not None and first.get("key_id") == key_id
            rebuild = same_key and _settings(other) == _settings(plan) and all(theirs[c] == wanted[c] for c in shared)
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            continue  # not one of ours
        if shared and not rebuild:
            return path.parent, len(shared)
    return None


def _noisy(plan: dict) -> dict[str, int]:
    """Noise levels that a plan's pictures are observed at, those that are stored clean left out."""
    return {content: t_n for content, t_n in observed_levels(plan).items() if t_n is not None}


def _settings(plan: dict) -> dict:
    """What shapes the latents beside the noise level, which each picture has for itself."""
    return {name: value for name, value in plan["fingerprint"]["latent"].items() if name != "t_n"}


SECOND = (
    "Each independent draw of the noise is one more observation of the same picture, and their average has less noise than "
    "t_n promises"
)


def check_first_observation(output_dir: Path, plan: dict, allowed: bool, warn) -> None:
    """Refuse to draw noise for pictures of which a neighbouring store already holds another draw."""
    if plan["fingerprint"]["latent"].get("pre_noised"):
        return  # nothing is drawn, and the same content is the same noise
    other = observed_elsewhere(output_dir, plan)
    if other is None:
        return
    folder, count = other
    message, use = f"{count} of these images already have a noisy latent in {folder}", "Use that store"
    if restored_levels(folder) is not None:
        message = f"{count} of these images were observed before: {folder} holds samples restored from their noisy latents"
        use = "Use the store of those latents"
    message = f"{message}. {SECOND}"
    if not allowed:
        raise StoreError(f"{message}. {use}, or give --allow_second_observation")
    warn(f"warning: {message}; going on, as --allow_second_observation asks")


def remove_store(folder: Path) -> None:
    """Delete a store's own files and no others. The plan goes last: latents without it would be taken for another plan's."""
    for pattern in ("manifest.json", "latents-*.safetensors", "prompts-*.safetensors", TOKENS, "plan.json"):
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
            restored = bool(rounds(stored))
            found = compare(stored, wanted)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{path} is damaged ({error}); what the store holds can't be told. Restore the file") from None
        if restored:
            # Whatever is allowed: a draw of noise would replace what the chain tells of.
            raise StoreError(f"{output_dir} holds restored samples, and no noise is drawn into it; use another folder")
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
