"""Whether plan.json and manifest.json hold what a store's can hold, and agree. Nothing that they say is believed before."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from sdxl_ambient.errors import StoreError, one_line
from sdxl_ambient.levels import MAXIMUM_T_N
from sdxl_ambient.provenance import CHECKSUM, read_json, read_sealed
from sdxl_ambient.store.plan import FORMAT_VERSION, TOKENS, shard_number
from sdxl_ambient.store.records import Manifest, Plan

_HASH = re.compile(r"[0-9a-f]{64}")
_PROMPTS = re.compile(r"prompts-[0-9a-f]{12}-[0-9a-f]{16}\.safetensors")
_MAXIMUM_SIDE = 1 << 20  # pixels


def read_plan(folder: Path) -> Plan | None:
    """plan.json of a store, finished or not; None where there is none.

    Raises:
        StoreError: damaged, changed after it was written, or of another format.
    """
    path = folder / "plan.json"
    if not path.exists():
        return None
    value = _read(path)
    _checked(path, lambda: check_plan(value))
    return cast(Plan, value)


def read_manifest(folder: Path) -> Manifest:
    """manifest.json of a finished store, which agrees with its plan.json.

    Raises:
        StoreError: unfinished, damaged, changed after it was written, or of another format.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise StoreError(f"{folder} is not a finished store of latents: it has no manifest.json")
    value = _read(path)
    _checked(path, lambda: check_manifest(value))
    plan = read_plan(folder)
    if plan is None:
        raise StoreError(f"{folder} is damaged: it has a manifest.json and no plan.json")
    if differing := sorted(name for name in plan if value.get(name) != plan[name]):
        raise StoreError(f"{folder} is damaged: manifest.json and plan.json disagree on {', '.join(differing)}")
    return cast(Manifest, value)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
        version = value["fingerprint"]["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise StoreError(f"{path} is damaged: {_why(path, error)}") from None
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{path} is of store format {version!r}, this version reads {FORMAT_VERSION}; make the store anew from its "
            "pictures in another folder, with --allow_second_observation while the earlier one exists"
        )
    try:
        return read_sealed(path)
    except KeyError:
        raise StoreError(f"{path} is damaged: it has no {CHECKSUM}") from None
    except (ValueError, OSError) as error:
        raise StoreError(f"{path} is damaged: {_why(path, error)}") from None


def _checked(path: Path, check: Any) -> None:
    try:
        check()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is damaged: {_why(path, error)}") from None


def _why(path: Path, error: BaseException) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else one_line(error).replace(f"{path} is", "it is")


# -- what they hold ------------------------------------------------------------------


def check_plan(plan: Mapping[str, Any]) -> None:
    """Raises ValueError, KeyError, TypeError or AttributeError: what a plan can't hold."""
    latent = plan["fingerprint"]["latent"]
    _check_level(latent["t_n"], "fingerprint.latent.t_n")
    for name, kind in (("schedule", str), ("vae", str)):
        if name in latent and not isinstance(latent[name], kind):
            raise ValueError(f"fingerprint.latent.{name} is {latent[name]!r}")
    if not {"tokenizers", "text_encoders"} <= plan["fingerprint"]["text"].keys():
        raise ValueError("fingerprint.text: it lacks tokenizers or text_encoders")
    if not _whole(plan["shard_size"], 1, 1 << 31):
        raise ValueError(f"shard_size is {plan['shard_size']!r}")
    if not isinstance(plan["store_id"], str):
        raise ValueError(f"store_id is {plan['store_id']!r}")
    images = plan["images"]
    if not isinstance(images, list) or not images:
        raise ValueError("images: there are none")
    restored = bool(plan.get("restored"))
    if restored:
        _check_lineage(plan["restored"])
    for entry in images:
        _check_entry(entry, restored)
    if len({entry["content"] for entry in images}) != len(images):
        raise ValueError("images: one is there twice")


def _check_lineage(lineage: Any) -> None:
    if not isinstance(lineage, list) or not all(isinstance(one, dict) for one in lineage):
        raise ValueError(f"restored is {type(lineage).__name__}; allowed is a list of rounds")
    for one in lineage:
        if not isinstance(one["parent"], str) or not _whole(one["images_restored"], 0, 1 << 31):
            raise ValueError("restored: a round has no parent or no number of images")


def _check_entry(entry: Mapping[str, Any], restored: bool) -> None:
    content = entry["content"]
    if not isinstance(content, str) or not _HASH.fullmatch(content):
        raise ValueError(f"images: content {content!r} is not a SHA-256")
    image = f"images: {content[:12]}"
    _check_level(entry["t_n"], f"{image}: t_n")
    if restored:
        _check_level(entry["observed_t_n"], f"{image}: observed_t_n")
    ids = entry["time_ids"]
    if not isinstance(ids, list) or len(ids) != 6 or not all(_whole(i, 0, _MAXIMUM_SIDE) for i in ids):
        raise ValueError(f"{image}: time_ids are {ids!r}; allowed are six whole numbers of pixels")
    if not all(ids[4:]):
        raise ValueError(f"{image}: time_ids end in {ids[4:]}, which is no size of a latent")
    captions = entry["captions"]
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
        raise ValueError(f"{image}: captions are {captions!r}")
    if not isinstance(entry["shard"], str) or shard_number(entry["shard"]) is None:
        raise ValueError(f"{image}: shard {entry['shard']!r} is no file of latents")


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Raises ValueError, KeyError, TypeError or AttributeError: what a manifest can't hold."""
    check_plan(manifest)
    prompts, hashes = manifest["prompts"], manifest["sha256"]
    for caption, name in prompts.items():
        if not isinstance(name, str) or not _PROMPTS.fullmatch(name):
            raise ValueError(f"prompts: {caption[:12]}: {name!r} is no file of embeddings")
        if not {f"{caption}.embeds", f"{caption}.pooled"} <= hashes[name].keys():
            raise ValueError(f"sha256: {name} has nothing of the caption {caption[:12]}")
    if manifest.get("tokens") not in (None, TOKENS):
        raise ValueError(f"tokens: {manifest['tokens']!r} is no file of tokens")
    for entry in manifest["images"]:
        if unknown := [c for c in entry["captions"] if c not in prompts]:
            raise ValueError(f"images: {entry['content'][:12]}: the caption {unknown[0][:12]!r} is unknown")
        if entry["content"] not in hashes[entry["shard"]]:
            raise ValueError(f"sha256: {entry['shard']} has nothing of {entry['content'][:12]}")
    for name, tensors in hashes.items():
        known = shard_number(name) is not None or _PROMPTS.fullmatch(name) or name == TOKENS
        if not known or not all(isinstance(v, str) and _HASH.fullmatch(v) for v in tensors.values()):
            raise ValueError(f"sha256: {name!r} is no file of a store, or its hashes are none")


def _check_level(t_n: Any, name: str) -> None:
    if t_n is not None and not _whole(t_n, 0, MAXIMUM_T_N):
        raise ValueError(f"{name} is {t_n!r}; allowed are null and timesteps from 0 to {MAXIMUM_T_N}")


def _whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most
