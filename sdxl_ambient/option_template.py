"""configs/template.yaml, written from the options themselves: every one, commented out, with its help and its default.

python -m sdxl_ambient.option_template configs/template.yaml
"""

from __future__ import annotations

import dataclasses
import textwrap

import yaml

from sdxl_ambient.option_table import groups, write

HEAD = """# Every option of train_sdxl_ambient.py with its default, to copy and uncomment.
#   accelerate launch train_sdxl_ambient.py --config_file configs/template.yaml \\
#     --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
#     --train_data_dir my_images --output_dir runs/mine
# Expected: nothing is set here, so a run is one with the defaults. Not measured here.
# Written by python -m sdxl_ambient.option_template configs/template.yaml.
"""
WIDTH = 120


def entry(field: dataclasses.Field) -> str:
    """Two or more lines: the help as a comment, and ``#name: default`` without a space, to tell them apart."""
    default = field.default_factory() if field.default is dataclasses.MISSING else field.default
    choices = f" ({', '.join(map(str, field.metadata['choices']))})" if field.metadata["choices"] else ""
    described = textwrap.wrap(f"{field.metadata['help']}{choices}", WIDTH - 2, break_on_hyphens=False)
    return "\n".join([*(f"# {line}" for line in described), f"#{field.name}: {shown(default)}"])


def shown(value) -> str:
    """A default as our YAML reader takes it: none for None, a list in brackets, texts quoted where they must be."""
    if value is None:
        return "none"
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1000).removesuffix("...\n").strip()


def template() -> str:
    """The whole of configs/template.yaml."""
    parts = [HEAD]
    for title, own in groups():
        parts.append("\n\n".join([f"# == {title} ==", *map(entry, own)]) + "\n")
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    return write("option_template", template, argv)


if __name__ == "__main__":
    raise SystemExit(main())
