"""Convert what was trained to what other programs read, and LoRAs from elsewhere to ours.

    python -m sdxl_ambient.export --lora RUN --format kohya --output style.safetensors        (ComfyUI, A1111, Forge, kohya)
    python -m sdxl_ambient.export --lora style.safetensors --format peft --output DIR         (diffusers, and training here)
    python -m sdxl_ambient.export --unet RUN --pretrained_model_name_or_path BASE --format pipeline --output DIR
    python -m sdxl_ambient.export --unet RUN --pretrained_model_name_or_path BASE --format single_file --output FILE
    python -m sdxl_ambient.export --lora DORA --bake --pretrained_model_name_or_path BASE --format kohya --output FILE
    python -m sdxl_ambient.export --unet RUN --bake --pretrained_model_name_or_path BASE --format peft --output DIR

Only safetensors are read and written. An output that exists is not overwritten, and one that is cut short leaves nothing.
See docs/INTERCHANGE.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from sdxl_ambient.config.parser import option, parse_options, redeclare
from sdxl_ambient.config.shared import DTYPES, LoraOrUnetOptions, ModelOptions
from sdxl_ambient.errors import OptionError, run_command

if TYPE_CHECKING:
    import torch

FORMATS = {"kohya": "lora", "peft": "lora", "pipeline": "unet", "single_file": "unet"}
LAYOUTS = ("sgm", "diffusers")  # of :mod:`sdxl_ambient.formats.names`, which imports diffusers


@dataclass
class ExportOptions(LoraOrUnetOptions):
    """Conversion"""

    format: str = option(None, "what to make: a LoRA kohya or peft; of a UNet pipeline or single_file", choices=(*FORMATS,))
    output: str = option(None, "the file, or for peft and pipeline the folder, to write")
    layout: str = option("sgm", "names of the UNet's blocks in kohya's format", choices=LAYOUTS)
    dtype: str | None = option(None, "precision to store; by default as it is", choices=DTYPES)
    pretrained_model_name_or_path: str | None = option(
        None, "base model: for --unet, whose other parts it gives; for a LoRA only where it isn't of SDXL's own size"
    )
    revision: str | None = redeclare(ModelOptions, "revision")
    prediction_type: str | None = redeclare(ModelOptions, "prediction_type")
    title: str | None = option(None, "what programs show as the model's name")
    allow_dora: bool = option(
        False, "write a DoRA in kohya's format, although most of its readers draw it otherwise than it was trained"
    )
    bake: bool = option(
        False, "write the change (of a DoRA, or of --unet) as a plain LoRA of higher rank, by SVD, and print its error"
    )
    bake_rank: int | None = option(None, "its rank; by default twice the LoRA's, 32 at least, and 128 of --unet", minimum=1)

    def validate(self) -> None:
        if (self.lora is None) == (self.unet is None):
            raise OptionError("give --lora or --unet, one of them")
        for name in ("format", "output"):
            if getattr(self, name) is None:
                raise OptionError(f"--{name}: a value is required")
        kind = "lora" if self.lora is not None else "unet"
        if self.bake:
            self._validate_bake()
        elif self.bake_rank is not None:
            raise OptionError("--bake_rank: goes with --bake")
        elif FORMATS[self.format] != kind:
            allowed = ", ".join(f for f, k in FORMATS.items() if k == kind)
            raise OptionError(f"--format: {self.format!r} can't be made of a {kind}; {allowed} can")
        if not Path(getattr(self, kind)).exists():
            raise OptionError(f"--{kind}: {getattr(self, kind)!r} does not exist")
        if (kind == "unet" or self.bake) and not self.pretrained_model_name_or_path:
            role = "the base that was changed" if self.bake else "the base whose other parts are used"
            raise OptionError(f"--pretrained_model_name_or_path: a value is required, {role}")
        if self.format == "pipeline" and self.dtype:
            raise OptionError("--dtype: a pipeline's parts stay as they are; a precision is chosen when it is loaded")
        self._validate_output()

    def _validate_bake(self) -> None:
        if FORMATS[self.format] != "lora":
            raise OptionError(f"--bake: makes a LoRA, not {self.format!r}; give --format kohya or peft")
        if self.allow_dora:
            raise OptionError("--allow_dora: can not be combined with --bake, which leaves no DoRA")

    def _validate_output(self) -> None:
        output = Path(self.output)
        if self.format in ("kohya", "single_file") and output.suffix != ".safetensors":
            raise OptionError(f"--output: {self.output!r} must end in .safetensors")
        if output.exists() or output.is_symlink():
            raise OptionError(f"--output: {self.output!r} exists already; nothing is overwritten")


def main(argv: list[str] | None = None) -> int:
    options = parse_options(ExportOptions, argv, prog="sdxl_ambient.export", description=__doc__)
    # A file from elsewhere can be damaged in ways that no UserError foresees.
    damaged = (SafetensorError, ValueError, LookupError)
    return run_command("sdxl_ambient.export", lambda: print(export(options)), also=damaged)


def export(options: ExportOptions) -> str:
    """Convert what the options name. Returns the lines that say what was written."""
    # Here for start-up time: options are parsed before torch and diffusers are imported.
    from sdxl_ambient import devices
    from sdxl_ambient.formats.lora_export import export_lora
    from sdxl_ambient.formats.unet_export import export_unet
    from sdxl_ambient.models.base import unet_config

    output, base = Path(options.output), options.pretrained_model_name_or_path
    dtype = devices.DTYPES[options.dtype] if options.dtype else None
    if options.bake:
        return _bake(options, output, dtype)
    if options.lora is not None:
        config = unet_config(base, options.revision) if base else None
        return export_lora(
            options.lora,
            output,
            format=options.format,
            layout=options.layout,
            config=config,
            dtype=dtype,
            title=options.title,
            allow_dora=options.allow_dora,
        )
    assert options.unet is not None and base is not None  # validate() has seen to it
    return export_unet(
        options.unet,
        output,
        format=options.format,
        base=base,
        revision=options.revision,
        prediction_type=options.prediction_type,
        dtype=dtype,
        title=options.title,
    )


def _bake(options: ExportOptions, output: Path, dtype: torch.dtype | None) -> str:
    """Write the change as a plain LoRA."""
    from sdxl_ambient.formats.bake import bake_lora, bake_unet, default_rank
    from sdxl_ambient.formats.lora_export import export_lora
    from sdxl_ambient.formats.read import read_adapter
    from sdxl_ambient.formats.record import public_info, read_training_info
    from sdxl_ambient.formats.unet_export import fine_tuned_unet
    from sdxl_ambient.models.base import load_schedule, unet_config

    base, revision = options.pretrained_model_name_or_path, options.revision
    assert base is not None  # validate() has seen to it
    config = unet_config(base, revision)
    if options.lora is not None:
        adapter = read_adapter(options.lora, config)
        _check_trained_on(adapter.info, load_schedule(base, revision, options.prediction_type).prediction_type, base)
        rank = options.bake_rank or default_rank(adapter)
        baked = bake_lora(adapter, base, rank, revision, dtype)
    else:
        unet, rank = Path(str(options.unet)), options.bake_rank or default_rank(None)
        state = fine_tuned_unet(unet, Path(base), config, options.prediction_type)
        baked = bake_unet(state, base, rank, public_info(read_training_info(unet)), revision, dtype)
    layout, title = options.layout, options.title
    text = export_lora(baked.adapter, output, format=options.format, layout=layout, config=config, dtype=dtype, title=title)
    return "\n".join([text, *baked.lines(rank)])


def _check_trained_on(info: dict, prediction_type: str, base: str) -> None:
    """A LoRA that was trained to predict another quantity than the base does changes another base's weights."""
    trained = info.get("prediction_type", prediction_type)
    if trained != prediction_type:
        raise OptionError(
            f"--pretrained_model_name_or_path: {base!r} predicts {prediction_type}, and the LoRA was trained to predict "
            f"{trained}; give the base that it was trained on"
        )


if __name__ == "__main__":
    raise SystemExit(main())
