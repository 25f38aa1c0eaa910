"""Whether a round may be drawn: what the model has seen of the pictures, and what their latents were drawn from."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, cast

import torch

from sdxl_ambient.errors import InterchangeError, ModelError, StoreError
from sdxl_ambient.formats.find import lora_file
from sdxl_ambient.loop.model import load_model, read_lora
from sdxl_ambient.loop.settings import LoopSettings
from sdxl_ambient.models.load import load_encoders, load_unet
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.provenance import hash_file, hash_json, hash_tensors, versions
from sdxl_ambient.store.lineage import first_observations, format_levels, lowered
from sdxl_ambient.store.plan import fingerprint_of_text
from sdxl_ambient.store.reader import LatentStore
from sdxl_ambient.store.records import RestoringModel, Round


def check_base(settings: LoopSettings, store: LatentStore, schedule: NoiseSchedule, info: dict[str, Any]) -> None:
    """The base model must be the one that the store was made with, and what was trained must predict what it predicts.

    Raises:
        StoreError: naming the parts that differ.
        ModelError: another prediction type.
    """
    base, have = settings.pretrained_model_name_or_path, store.manifest["fingerprint"]
    predicts = info.get("prediction_type", schedule.prediction_type)
    if predicts != schedule.prediction_type and settings.model is not None:
        name, path = settings.model
        raise ModelError(
            f"--{name}: {path!r} was trained to predict {predicts}, but the scheduler of {base} "
            f"says {schedule.prediction_type}"
        )
    wrong = ["schedule"] if store.schedule_hash != schedule.hash else []
    if not wrong:
        encoders = load_encoders(
            base,
            vae=settings.pretrained_vae_model_name_or_path,
            revision=settings.revision,
            variant=settings.variant,
        )
        vae = {"vae": hash_tensors(encoders.vae.state_dict()), "scaling_factor": encoders.vae.config["scaling_factor"]}
        # Latents that were noisy already have no VAE.
        wanted = {**{k: v for k, v in vae.items() if k in have["latent"]}, **fingerprint_of_text(encoders)}
        stored: dict[str, Any] = {**have["latent"], **have["text"]}
        wrong = [name for name, value in wanted.items() if stored.get(name) != value]
    if wrong:
        raise StoreError(
            f"the store {store.folder} was made with another base model than {base} ({', '.join(wrong)} differ); give that"
        )


def seen_besides(info: dict[str, Any] | None, store: LatentStore) -> str | None:
    """What a model may have seen of a store's images besides their observations, in words; None for nothing.

    A model has seen nothing else if it was trained on the store, on one that the store was restored from, or on samples
    restored from either, and if the same holds of what its training started from and of the models that drew those samples.

    Args:
        info: what training recorded (training.json).
    """
    wanted = first_observations(store.lineage, store.hash)
    while info is not None:
        lineage = info.get("restored") or []
        level = "none" if info.get("t_n") is None else info["t_n"]
        if not info.get("data"):
            return "does not say what it was trained on"
        if first_observations(lineage, info["data"]) != wanted:
            return f"was trained on other data, at t_n = {level}"
        if info.get("low_noise") == "clean":
            return "was trained on the clean images too (--low_noise clean)"
        if any(a_round["foreign_model"] for a_round in lineage):
            return "was trained on samples that a model of other data drew"
        info = info.get("started_from")
    return None


def check_history(settings: LoopSettings, store: LatentStore, info: dict[str, Any]) -> bool:
    """Whether the model may have seen more of the images than the store's observations, where that is allowed.

    Raises:
        StoreError: where it isn't.
    """
    if settings.model is None:
        return False
    besides = seen_besides(info, store)
    if besides is not None and not settings.allow_foreign_model:
        name, path = settings.model
        at = format_levels(store.observed.values())
        raise StoreError(
            f"--{name}: {path!r} {besides}; what it draws may tell more of these images than their observations at t_n = "
            f"{at} do. Use a model trained on this store alone, or give --allow_foreign_model"
        )
    return besides is not None


def next_round(settings: LoopSettings, store: LatentStore, info: dict[str, Any], foreign: bool) -> Round:
    """How this round's samples come about. No name of a file or folder is in it, and no key."""
    base_model, model = _weights(settings)
    recorded = {name: info[name] for name in ("t_n", "data", "step") if name in info}
    before = Counter("none" if entry["t_n"] is None else str(entry["t_n"]) for entry in store.images)
    own: Round = {
        "t_n": settings.t_n,
        "parent": store.hash,
        "parent_levels": dict(sorted(before.items())),
        "images_restored": sum(lowered(entry, settings.t_n) for entry in store.images),
        "captions": hash_json([entry["captions"][:1] for entry in store.images]),
        "model": cast(RestoringModel, {**model, **recorded}),
        "base_model": base_model,
        "foreign_model": foreign,
        "steps": settings.steps,
        "seed": settings.seed,
        "dtype": settings.dtype,
        "versions": versions(),
    }
    if not store.lineage:
        # The round that read the observations keeps the id of their noise's key; later rounds don't repeat it.
        own["key_id"] = store.manifest.get("key_id")
    return own


def _weights(settings: LoopSettings) -> tuple[str, RestoringModel]:
    """The hash of the base model's UNet, and the model that restores: its kind and its own hash.

    Raises:
        InterchangeError: a LoRA that can't be read, before anything is written.
    """
    # In float32, into which every other precision goes without loss, so that the hash is that of the weights.
    unet = load_unet(settings.pretrained_model_name_or_path, revision=settings.revision, variant=settings.variant)
    base = hash_tensors(unet.state_dict())
    if settings.lora is not None:
        try:
            read_lora(settings.lora, dict(unet.config))
        except InterchangeError as error:
            raise InterchangeError(f"--lora: {error}") from None
        return base, {"kind": "lora", "weights": hash_file(lora_file(Path(settings.lora)))}
    if settings.unet is not None:
        return base, {"kind": "unet", "weights": hash_tensors(load_model(settings, torch.float32).state_dict())}
    return base, {"kind": "base", "weights": base}
