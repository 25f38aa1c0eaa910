"""The Hugging Face Hub: what a result is described by, and its upload.

    python -m sdxl_ambient.hub --output_dir DIR --hub_model_id NAME

uploads what a training run left in DIR: the adapter or the UNet, training.json and a model card. The card says at what noise
level and for what objective it was trained, how to sample it, and what has been measured of its memorisation. Nothing else
leaves the machine: no checkpoint, latent, option, log or caption. The login is huggingface_hub's own (``hf auth login``, or
HF_TOKEN).
"""

from __future__ import annotations

from sdxl_ambient.config import parse_options
from sdxl_ambient.errors import run_command
from sdxl_ambient.hub.options import PushOptions


def main(argv: list[str] | None = None) -> int:
    options = parse_options(PushOptions, argv, prog="python -m sdxl_ambient.hub", description=__doc__)
    return run_command("python -m sdxl_ambient.hub", lambda: _push(options))


def _push(options: PushOptions) -> None:
    # Here for start-up time: options are parsed before torch and diffusers are imported.
    from sdxl_ambient.hub.upload import push, repository

    push(
        options.output_dir,
        repo_id=repository(options.hub_model_id, options.output_dir),
        private=options.hub_private,
        license=options.hub_license,
        report=options.memorization_report,
        validation_images=options.validation_images,
    )


if __name__ == "__main__":
    raise SystemExit(main())
