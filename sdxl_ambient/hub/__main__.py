"""The Hugging Face Hub: what a result is described by, and its upload.

    python -m sdxl_ambient.hub --output_dir DIR --hub_model_id NAME

uploads what a training run left in DIR: the adapter or the UNet, training.json and a model card. The card says at what noise
level and for what objective it was trained, how to sample it, and what has been measured of its memorisation. Nothing else
leaves the machine: no checkpoint, latent, option, log or caption. The login is huggingface_hub's own (``hf auth login``, or
HF_TOKEN).
"""

from __future__ import annotations

import sys

from sdxl_ambient.config.parser import parse_options
from sdxl_ambient.errors import HubError
from sdxl_ambient.hub.options import PushOptions
from sdxl_ambient.hub.upload import push, repository


def main(argv: list[str] | None = None) -> int:
    options = parse_options(PushOptions, argv, prog="python -m sdxl_ambient.hub", description=__doc__)
    try:
        push(
            options.output_dir,
            repo_id=repository(options.hub_model_id, options.output_dir),
            private=options.hub_private,
            license=options.hub_license,
            report=options.memorization_report,
            validation_images=options.validation_images,
        )
    except HubError as error:
        print(f"python -m sdxl_ambient.hub: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
