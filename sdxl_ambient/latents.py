"""Image → latent → noisy latent, once: makes a store of noisy latents and prompt embeddings that training reads.

    python -m sdxl_ambient.latents --pretrained_model_name_or_path BASE --train_data_dir DIR --t_n 500 --output_dir STORE

A store is a folder of sharded safetensors:

    plan.json            what will be drawn; written before the first draw
    latents-00000.safetensors …   one tensor (4, h, w) per picture, named by the hash of its pixels
    prompts-<hash>.safetensors …  two tensors per distinct caption and the empty one: its states and its pooled embedding
    tokens.safetensors   where text encoders are trained: one tensor (2, 77) per caption, its tokens for each of the two
    manifest.json        written last; a store without it is unfinished

With --pre_noised the latents come from files that are noisy already (:mod:`sdxl_ambient.store.prenoised`); nothing is drawn.

Every picture is drawn once. Shards that exist are never drawn anew, the program stops at a store of something else and
names the difference, and at a second draw of a picture unless ``--allow_second_observation`` is given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdxl_ambient.config import LatentsOptions, parse_options
from sdxl_ambient.config.settings import settings_of
from sdxl_ambient.errors import run_command

if TYPE_CHECKING:
    from sdxl_ambient.store.build import build_store

__all__ = ["build_store", "main"]


def __getattr__(name: str) -> Any:
    """``build_store`` is imported when it is first asked for, so that the command line starts fast."""
    if name != "build_store":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sdxl_ambient.store.build import build_store

    return build_store


def main(argv: list[str] | None = None) -> int:
    options = parse_options(LatentsOptions, argv, prog="sdxl_ambient.latents", description=__doc__)
    return run_command("sdxl_ambient.latents", lambda: _build(options))


def _build(options: LatentsOptions) -> None:
    # Here for start-up time: options are parsed before torch and diffusers are imported.
    from sdxl_ambient.devices import processes
    from sdxl_ambient.images.geometry import Geometry
    from sdxl_ambient.models.base import check_sdxl, load_schedule
    from sdxl_ambient.models.load import load_encoders
    from sdxl_ambient.store.build import build_store
    from sdxl_ambient.store.settings import StoreSettings

    state, base, revision = processes(), options.pretrained_model_name_or_path, options.revision
    check_sdxl(base, revision, state.print, options.prediction_type)
    schedule = load_schedule(base, revision, options.prediction_type)
    buckets = options.aspect_ratio_buckets, options.bucket_reso_steps
    geometry = Geometry.parse(options.resolution, options.center_crop, *buckets)
    settings = settings_of(StoreSettings, options, geometry=geometry, keep_tokens=False)
    vae = options.pretrained_vae_model_name_or_path
    encoders = load_encoders(base, vae=vae, revision=revision, variant=options.variant).to(state.device or "cpu")
    build_store(options.train_data_dir, options.output_dir, encoders, schedule, settings, state=state)


if __name__ == "__main__":
    raise SystemExit(main())
