"""report.json → one self-contained index.html: verdicts, tables, curves, pairs, what was left out. Opens without a network.

python -m eval.report OUT [--pictures auto|all|generated|none]      writes OUT/index.html again from OUT/report.json

--pictures: what the page embeds: generated and training pictures (all), generated ones alone, or hashes (none). auto, the
default, is none where the report has a budget (--max_excess), else all.
"""

from __future__ import annotations

import sys
from pathlib import Path

from eval.shared_options import PageOptions
from sdxl_ambient.config.parser import parse_options
from sdxl_ambient.errors import StageError, run_command

USAGE = (__doc__ or "").strip()


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if not arguments or arguments[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        return 2
    options = parse_options(PageOptions, arguments[1:], prog="eval.report", description=USAGE)
    return run_command("eval.report", lambda: _write(arguments[0], options.pictures))


def _write(folder: str, pictures: str) -> None:
    # Here for start-up time: what was asked for is checked before matplotlib and jinja2 are imported.
    from jinja2 import TemplateError

    from eval.reporting.page import write_html
    from eval.reporting.pictures import choose
    from sdxl_ambient.provenance import read_sealed

    try:
        report = read_sealed(Path(folder) / "report.json")
        choice = choose(pictures, report["settings"].get("max_excess"))
        page = write_html(report, folder, choice)
        print(choice.sentence)
        print(page)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, TemplateError) as error:
        raise StageError(f"{folder!r} has no usable report.json: {error}") from None


if __name__ == "__main__":
    raise SystemExit(main())
