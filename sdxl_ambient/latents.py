"""Image → latent → noisy latent, once: makes a store of noisy latents and prompt embeddings that training reads.

    python -m sdxl_ambient.latents --pretrained_model_name_or_path BASE --train_data_dir DIR --t_n 500 --output_dir STORE

A store is a folder of sharded safetensors:

    plan.json            what will be drawn; written before the first draw
    latents-00000.safetensors …   one tensor (4, h, w) per picture, named by the hash of its pixels
    prompts-<hash>.safetensors …  two tensors per distinct caption and the empty one: its states and its pooled embedding
    tokens.safetensors   where text encoders are trained: one tensor (2, 77) per caption, its tokens for each of the two
    manifest.json        written last; a store without it is unfinished

With --pre_noised the latents come from files that are noisy already (:mod:`sdxl_ambient.store.prenoised`); nothing is drawn.

Every picture is drawn once. Shards that exist are never drawn anew, a store that differs from what is asked for is refused
with the difference named, and a second draw of a picture is refused unless asked for.
"""

from __future__ import annotations

import sys

from sdxl_ambient.config.parser import parse_options
from sdxl_ambient.devices import processes
from sdxl_ambient.errors import ImagesMissing, ModelError, NoiseKeyError, StoreError
from sdxl_ambient.models.load import load_encoders, load_schedule
from sdxl_ambient.store.build import build_store


def main(argv: list[str] | None = None) -> int:
    from sdxl_ambient.config.data import LatentsOptions

    options = parse_options(LatentsOptions, argv, prog="sdxl_ambient.latents", description=__doc__)
    state = processes()
    try:
        base = options.pretrained_model_name_or_path
        where = dict(revision=options.revision)
        encoders = load_encoders(base, vae=options.pretrained_vae_model_name_or_path, variant=options.variant, **where)
        build_store(
            options.train_data_dir,
            options.output_dir,
            encoders.to(state.device),
            load_schedule(base, **where),
            options.geometry(),
            **options.of_a_store(),
            state=state,
        )
    except (ImagesMissing, StoreError, NoiseKeyError, ModelError, OSError) as error:
        print(f"sdxl_ambient.latents: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
