"""What plan.json and manifest.json hold, as types that the writers and the readers of a store share."""

from __future__ import annotations

from typing import Any, TypedDict


class _LatentSettings(TypedDict):
    schedule: str
    resolution: int | None
    t_n: int | None


class LatentSettings(_LatentSettings, total=False):
    """What shapes the noisy latents.

    ``schedule`` is the hash of ᾱ, ``vae`` that of its weights, ``t_n`` the level of images without their own, None for
    clean. Latents that were noisy already have ``pre_noised``, no resolution, and nothing of a VAE or a crop.
    """

    vae: str
    scaling_factor: float
    center_crop: bool
    buckets: list[list[int]]
    pre_noised: bool


class TextSettings(TypedDict):
    """What the embeddings of captions depend on: hashes of both tokenizers and both text encoders."""

    tokenizers: list[str]
    text_encoders: list[str]


class Fingerprint(TypedDict):
    """Everything but the pictures that a store depends on."""

    format_version: int
    latent: LatentSettings
    text: TextSettings


class _Entry(TypedDict):
    content: str
    time_ids: list[int]
    t_n: int | None
    captions: list[str]


class Entry(_Entry, total=False):
    """One picture of a store: the hash of its pixels, SDXL's time ids, its level (None: clean), hashes of its captions.

    ``shard`` is the file that its latent lies in, from the moment that the plan is on disk. ``observed_t_n``, in stores of
    restored samples alone, is the level of the one observation behind it.
    """

    shard: str
    observed_t_n: int | None


class _Model(TypedDict):
    kind: str
    weights: str


class RestoringModel(_Model, total=False):
    """The model that drew a round's samples: base, lora or unet, the hash of its weights, and what its training recorded."""

    t_n: int | None
    data: str
    step: int


class _Round(TypedDict):
    t_n: int
    parent: str
    parent_levels: dict[str, int]
    images_restored: int
    captions: str
    model: RestoringModel
    base_model: str
    foreign_model: bool
    steps: int
    seed: int
    dtype: str
    versions: dict[str, str]


class Round(_Round, total=False):
    """How one round of :mod:`sdxl_ambient.loop` restored samples, from the store whose hash is ``parent``.

    The first round of a lineage has ``key_id``, that of the observations.
    """

    key_id: str | None


class _Plan(TypedDict):
    fingerprint: Fingerprint
    shard_size: int
    images: list[Entry]


class Plan(_Plan, total=False):
    """plan.json: what a store will hold.

    ``key_id`` tells noise keys apart, None for a key that is kept nowhere. ``store_id`` is a random name by which the
    register of observations knows the store. ``second_observation`` says that other noise of some pictures existed and that
    this was allowed. ``restored`` is the lineage of restored samples.
    """

    key_id: str | None
    store_id: str
    second_observation: bool
    restored: list[Round]


class Skipped(TypedDict):
    """A file that a store leaves out, and why."""

    file: str
    reason: str


class Twin(TypedDict):
    """A file that shows an earlier one again, as it stands or mirrored; ``content`` is the hash of its pixels."""

    file: str
    shows: str
    mirrored: bool
    content: str


class Counts(TypedDict):
    """How many captions a store has, and how many of them were cut to what the text encoders read."""

    captions: int
    captions_cut: int


class _Prompts(TypedDict):
    prompts: dict[str, str]


class Prompts(_Prompts, total=False):
    """Which file holds a caption's embedding, by the caption's hash; and the file of tokens, where there is one."""

    tokens: str


Hashes = dict[str, dict[str, str]]  # file → tensor → SHA-256 of its name, dtype, shape and bytes


class Manifest(Plan, Prompts):
    """manifest.json of a finished store: its plan, its captions, and what was counted, skipped and found alike.

    ``sha256`` has the hash of every tensor that the store consists of.
    """

    sha256: Hashes

    counts: dict[str, int]
    skipped: list[Skipped]
    near_duplicates: list[Twin] | None
    ledger: dict[str, Any] | None  # what became of every file of the source
    versions: dict[str, str]
