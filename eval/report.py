"""report.json → one self-contained index.html: verdicts, tables, curves, pairs, what was left out. Opens without a network.

python -m eval.report OUT      writes OUT/index.html again from OUT/report.json
"""

from __future__ import annotations

import sys
from pathlib import Path

from eval.reporting.page import write_html
from sdxl_ambient.provenance import read_json


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__.strip(), file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    try:
        print(write_html(read_json(Path(arguments[0]) / "report.json"), arguments[0]))
    except (OSError, ValueError, KeyError) as error:
        print(f"eval.report: error: {arguments[0]!r} has no usable report.json: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
