"""Stores of noisy latents: planned, drawn once, read in batches."""

from sdxl_ambient.store.batches import Batch, Stream, collate, loader, small_groups
from sdxl_ambient.store.build import build_store
from sdxl_ambient.store.checks import check_stores, common_t_n, format_store_levels, levels_of, observed_t_n
from sdxl_ambient.store.keys import NoiseKey, noise_key
from sdxl_ambient.store.lineage import format_levels, is_store, lineage_of, observed_levels, restored_levels
from sdxl_ambient.store.observation import draw_z
from sdxl_ambient.store.reader import LatentStore, Presentation
from sdxl_ambient.store.records import Entry, Fingerprint, Manifest, Plan, Round
from sdxl_ambient.store.scan import Scanned, content_hash
from sdxl_ambient.store.settings import StoreSettings

__all__ = [
    "Batch",
    "Entry",
    "Fingerprint",
    "LatentStore",
    "Manifest",
    "NoiseKey",
    "Plan",
    "Presentation",
    "Round",
    "Scanned",
    "StoreSettings",
    "Stream",
    "build_store",
    "check_stores",
    "collate",
    "common_t_n",
    "content_hash",
    "draw_z",
    "format_levels",
    "format_store_levels",
    "is_store",
    "levels_of",
    "lineage_of",
    "loader",
    "noise_key",
    "observed_levels",
    "observed_t_n",
    "restored_levels",
    "small_groups",
]
