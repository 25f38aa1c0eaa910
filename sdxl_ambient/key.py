"""The noise key that is kept, and the register of what was observed with it.

    python -m sdxl_ambient.key                     where they are, and what lies on the key
    python -m sdxl_ambient.key backup FILE         key and register in one file, mode 600
    python -m sdxl_ambient.key restore FILE        from there, where there is neither
    python -m sdxl_ambient.key destroy --yes       delete the key: nobody can subtract its noise any more, nor draw it again
    python -m sdxl_ambient.key rebuild STORE …     a lost or damaged register anew, from the stores that there are

Whoever has the key and a store can subtract the noise and see the pictures. After ``destroy`` the register still knows which
pictures were observed, so that they are refused to every other key. docs/PRIVACY.md says who can do what.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sdxl_ambient.errors import run_command

COMMANDS = ("show", "backup", "restore", "destroy", "rebuild")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="sdxl_ambient.key", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(command="show", paths=[], yes=False)
    commands = parser.add_subparsers(dest="command", metavar="{" + ",".join(COMMANDS) + "}")
    commands.add_parser("show", help="where key and register are, and what lies on the key (the default)")
    for name, help in (("backup", "write key and register into FILE"), ("restore", "take them from FILE")):
        commands.add_parser(name, help=help).add_argument("paths", metavar="FILE", nargs=1)
    destroy = commands.add_parser("destroy", help="delete the key for good")
    destroy.add_argument("--yes", action="store_true", help="really")
    commands.add_parser("rebuild", help="make the register anew").add_argument("paths", metavar="STORE", nargs="+")
    options = parser.parse_args(argv)
    return run_command("sdxl_ambient.key", lambda: _run(options.command or "show", list(options.paths), options.yes))


def _run(command: str, paths: list[str], yes: bool) -> int:
    # Here for start-up time: --help needs neither torch nor diffusers.
    from sdxl_ambient.store import keeping

    if command == "show":
        print("\n".join(keeping.told()))
    elif command == "backup":
        print(keeping.backup(Path(paths[0])))
    elif command == "restore":
        print(keeping.restore(Path(paths[0])))
    elif command == "rebuild":
        print("\n".join(keeping.rebuild([Path(path) for path in paths])))
    elif not yes:
        print("\n".join(keeping.told()), file=sys.stderr)
        print("sdxl_ambient.key: error: --yes is needed to delete the key for good", file=sys.stderr)
        return 2
    else:
        print(keeping.destroy())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
