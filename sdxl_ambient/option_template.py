"""configs/template.yaml, written from the options themselves: every one, commented out, with its help and its default.

python -m sdxl_ambient.option_template configs/template.yaml
"""

from __future__ import annotations

from sdxl_ambient.config.reference import option_template, write_page


def main(argv: list[str] | None = None) -> int:
    return write_page("option_template", option_template, argv)


if __name__ == "__main__":
    raise SystemExit(main())
