"""Whether a round may be drawn: what the model has seen of the pictures, and what their latents were drawn from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from sdxl_ambient.errors import InterchangeError, ModelError, StoreError
from sdxl_ambient.formats.find import lora_file
from sdxl_ambient.loop.model import load_model, read_lora
from sdxl_ambient.loop.options import LoopOptions, lowered
from sdxl_ambient.models.load import load_encoders, load_unet
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.provenance import hash_file, hash_json, hash_tensors, versions
from sdxl_ambient.store.lineage import format_levels
from sdxl_ambient.store.plan import fingerprint_of_text
from sdxl_ambient.store.reader import LatentStore


def check_base(options: LoopOptions, store: LatentStore, schedule: NoiseSchedule, info: dict) -> None:
    """The base model must be the one that the store was made with, and what was trained must predict what it predicts.

    Raises:
        StoreError: naming the parts that differ.
        ModelError: another prediction type.
    """
    base, have = options.pretrained_model_name_or_path, store.manifest["fingerprint"]
    predicts = info.get("prediction_type", schedule.prediction_type)
    if predicts != schedule.prediction_type:
        raise ModelError(
            f"--{options.model[0]}: {options.model[1]!r} was trained to predict {predicts}, but the scheduler of {base} "
            f"says {schedule.prediction_type}"
        )
    wrong = ["schedule"] if store.schedule_hash != schedule.hash else []
    if not wrong:
        encoders = load_encoders(
            base,
            vae=options.pretrained_vae_model_name_or_path,
            revision=options.revision,
            variant=options.variant,
        )
        vae = {"vae": hash_tensors(encoders.vae.state_dict()), "scaling_factor": encoders.vae.config.scaling_factor}
        # Latents that were noisy already have no VAE.
        wanted = {**{k: v for k, v in vae.items() if k in have["latent"]}, **fingerprint_of_text(encoders)}
        wrong = [name for name, value in wanted.items() if {**have["latent"], **have["text"]}.get(name) != value]
    if wrong:
        raise StoreError(
            f"the store {store.folder} was made with another base model than {base} ({', '.join(wrong)} differ); give that"
        )


def first_observations(rounds: Sequence[dict], data: str | None) -> str | None:
    """The hash of the store of observations behind some data: the data itself, or the first parent of restored samples."""
    return rounds[0]["parent"] if rounds else data


def seen_besides(info: dict | None, store: LatentStore) -> str | None:
    """What a model may have seen of a store's images besides their observations, in words; None for nothing.

    A model has seen nothing else if it was trained on the store, on one that the store was restored from, or on samples
    restored from either, and if the same holds of what its training started from and of the models that drew those samples.

    Args:
        info: what training recorded (training.json).
    """
    wanted = first_observations(store.rounds, store.hash)
    while info is not None:
        links = info.get("restored") or []
        level = "none" if info.get("t_n") is None else info["t_n"]
        if not info.get("data"):
            return "does not say what it was trained on"
        if first_observations(links, info["data"]) != wanted:
            return f"was trained on other data, at t_n = {level}"
        if info.get("low_noise") == "clean":
            return "was trained on the clean images too (--low_noise clean)"
        if any(link["foreign_model"] for link in links):
            return "was trained on samples that a model of other data drew"
        info = info.get("started_from")
    return None


def check_history(options: LoopOptions, store: LatentStore, info: dict) -> bool:
    """Whether the model may have seen more of the images than the store's observations, where that is allowed.

    Raises:
        StoreError: where it isn't.
    """
    found = None if options.model is None else seen_besides(info, store)
    if found is not None and not options.allow_foreign_model:
        name, path = options.model
        at = format_levels(store.observed.values())
        raise StoreError(
            f"--{name}: {path!r} {found}; what it draws may tell more of these images than their observations at t_n = {at} "
            "do. Use a model trained on this store alone, or give --allow_foreign_model"
        )
    return found is not None


def make_link(options: LoopOptions, store: LatentStore, info: dict, foreign: bool) -> dict:
    """How this round's samples come about. No name of a file or folder is in it, and no key."""
    base = options.pretrained_model_name_or_path
    weights = dict(revision=options.revision, variant=options.variant)
    # In float32, into which every other precision goes without loss, so that the hash is that of the weights.
    unet = load_unet(base, **weights)
    base_hash = own_hash = hash_tensors(unet.state_dict())
    kind, path = options.model or ("base", None)
    if kind == "lora":
        try:
            read_lora(path, dict(unet.config))  # before anything is written
        except InterchangeError as error:
            raise InterchangeError(f"--lora: {error}") from None
        own_hash = hash_file(lora_file(Path(path)))
    elif kind == "unet":
        own_hash = hash_tensors(load_model(options, torch.float32).state_dict())
    before = Counter("none" if i["t_n"] is None else str(i["t_n"]) for i in store.images)
    link = {
        "t_n": options.t_n,
        "parent": store.hash,
        "parent_levels": dict(sorted(before.items())),
        "images_restored": sum(lowered(i, options.t_n) for i in store.images),
        "captions": hash_json([i["captions"][:1] for i in store.images]),
        "model": {"kind": kind, "weights": own_hash, **{n: info[n] for n in ("t_n", "data", "step") if n in info}},
        "base_model": base_hash,
        "foreign_model": foreign,
        "steps": options.steps,
        "seed": options.seed,
        "dtype": options.dtype,
        "versions": versions(),
    }
    # Whose noise the observations have is told once, by the round that read them.
    return link if store.rounds else {**link, "key_id": store.manifest.get("key_id")}
