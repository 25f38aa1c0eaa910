"""report.json → one self-contained index.html: verdicts, tables, curves, pairs, what was left out. Opens without a network.

python -m eval.report OUT      writes OUT/index.html again from OUT/report.json
"""

from __future__ import annotations

import sys
from pathlib import Path

from sdxl_ambient.errors import StageError, run_command

USAGE = (__doc__ or "").strip()


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        return 2
    return run_command("eval.report", lambda: _write(arguments[0]))


def _write(folder: str) -> None:
    # Here for start-up time: what was asked for is checked before matplotlib and jinja2 are imported.
    from jinja2 import TemplateError

    from eval.reporting.page import write_html
    from sdxl_ambient.provenance import read_sealed

    try:
        print(write_html(read_sealed(Path(folder) / "report.json"), folder))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, TemplateError) as error:
        raise StageError(f"{folder!r} has no usable report.json: {error}") from None


if __name__ == "__main__":
    raise SystemExit(main())
