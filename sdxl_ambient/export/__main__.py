"""Convert what was trained to what other programs read, and LoRAs from elsewhere to ours.

    python -m sdxl_ambient.export --lora RUN --format kohya --output style.safetensors        (ComfyUI, A1111, Forge, kohya)
    python -m sdxl_ambient.export --lora style.safetensors --format peft --output DIR         (diffusers, and training here)
    python -m sdxl_ambient.export --unet RUN --pretrained_model_name_or_path BASE --format pipeline --output DIR
    python -m sdxl_ambient.export --unet RUN --pretrained_model_name_or_path BASE --format single_file --output FILE

Only safetensors are read and written. An output that exists is not overwritten, and one that is cut short leaves nothing.
See docs/INTERCHANGE.md.
"""

from __future__ import annotations

from safetensors import SafetensorError

from sdxl_ambient.config import parse_options
from sdxl_ambient.errors import run_command
from sdxl_ambient.export.options import ExportOptions


def main(argv: list[str] | None = None) -> int:
    options = parse_options(ExportOptions, argv, prog="sdxl_ambient.export", description=__doc__)
    # A file from elsewhere can be damaged in ways that no UserError foresees.
    damaged = (SafetensorError, ValueError, LookupError)
    return run_command("sdxl_ambient.export", lambda: _export(options), also=damaged)


def _export(options: ExportOptions) -> None:
    # Here for start-up time: options are parsed before torch and diffusers are imported.
    from sdxl_ambient.export.run import export_lora, export_unet

    print((export_lora if options.lora is not None else export_unet)(options))


if __name__ == "__main__":
    raise SystemExit(main())
