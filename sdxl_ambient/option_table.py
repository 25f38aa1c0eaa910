"""docs/OPTIONS.md, written from the options themselves.

python -m sdxl_ambient.option_table docs/OPTIONS.md
"""

from __future__ import annotations

from sdxl_ambient.config.reference import option_table, write_page


def main(argv: list[str] | None = None) -> int:
    return write_page("option_table", option_table, argv)


if __name__ == "__main__":
    raise SystemExit(main())
