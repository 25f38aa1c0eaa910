"""What a user does with the kept key and the register: looks, saves them, brings them back, destroys, rebuilds."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from sdxl_ambient.errors import NoiseKeyError, StoreError, one_line
from sdxl_ambient.home import KEY_BYTES, home, home_lock, private_home, secret_file
from sdxl_ambient.provenance import read_sealed, write_sealed
from sdxl_ambient.store.keys import kept_path, noise_key
from sdxl_ambient.store.lineage import lineage_of
from sdxl_ambient.store.reconcile import observations_of
from sdxl_ambient.store.register import KEPT, SECRET, StoreRow, new_register, open_register, register_path
from sdxl_ambient.store.validate import read_plan

_BACKUP = "sdxl_ambient keys and register, 1"


def told() -> list[str]:
    """Where the key is, its id, and every store that was drawn with it or with another."""
    if not kept_path().exists() and not register_path().exists():
        return [f"No key and no register in {home()}: no picture was observed yet."]
    with open_register() as register:
        rows, pictures = register.stores(), register.pictures(None)
    own = noise_key().id if kept_path().exists() else None
    lines = [f"key       {kept_path()}" if own else f"key       none in {home()}: it was destroyed, or never used"]
    lines += [f"          id {own[:16]}, mode 600. With a store, it gives the pictures back"] if own else []
    lines += [f"register  {register_path()}: {pictures} pictures in {len({row.store for row in rows})} stores"]
    for title, some in (
        ("drawn with this key", [row for row in rows if own and row.key_id == own]),
        ("drawn with other keys", [row for row in rows if row.key_id not in (None, own)]),
        ("drawn with keys that were never written", [row for row in rows if row.key_id is None]),
    ):
        lines += [f"{title}:", *map(_row, some)] if some else []
    return lines


def _row(row: StoreRow) -> str:
    levels = ", ".join(f"{count} at t_n {t_n}" for t_n, count in sorted(row.levels.items()))
    there = "" if (Path(row.folder) / "plan.json").exists() else "; no store is there any more"
    return f"  {row.folder}: {levels}, since {row.since}{', a second observation' if row.second else ''}{there}"


def backup(path: Path) -> str:
    """Write key, register and the register's own key into one new file of mode 600.

    Raises:
        NoiseKeyError: there is no key, or the file is there already.
    """
    if not kept_path().exists():
        raise NoiseKeyError(f"there is no key to back up in {home()}")
    with open_register() as register:
        rows = register.dump()
    value = {
        "what": _BACKUP,
        KEPT: secret_file(kept_path()).hex(),
        SECRET: secret_file(home() / SECRET).hex(),
        "observations": rows,
    }
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        raise NoiseKeyError(f"{str(path)!r} exists; give a new file") from None
    _write_private(path, value)
    return f"{path}: the key and {len(rows)} observations. Whoever has this file and a store has the pictures"


def _write_private(path: Path, value: dict[str, Any]) -> None:
    before = os.umask(0o077)
    try:
        write_sealed(path, value)
    finally:
        os.umask(before)


def restore(path: Path) -> str:
    """Bring a backup back, where there is neither key nor register.

    Raises:
        NoiseKeyError: something is there, or the file is no backup.
    """
    if kept_path().exists() or register_path().exists():
        raise NoiseKeyError(f"{home()} has a key or a register; nothing is overwritten. Move them away first")
    try:
        value = read_sealed(path)
        if value["what"] != _BACKUP:
            raise ValueError("it is of another kind")
        keys = {name: bytes.fromhex(value[name]) for name in (KEPT, SECRET)}
        if any(len(key) != KEY_BYTES for key in keys.values()):
            raise ValueError("a key is damaged")
        rows = [tuple(row) for row in value["observations"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise NoiseKeyError(f"{str(path)!r} is no backup of a key ({one_line(error)})") from None
    with home_lock():
        for name, key in keys.items():
            with os.fdopen(os.open(private_home() / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(key.hex() + "\n")
        with closing(sqlite3.connect(register_path())):
            pass
    with open_register() as register:
        register.load(rows)
    return f"{home()}: the key and {len(rows)} observations are back"


def destroy() -> str:
    """Overwrite and delete the kept key. The register stays.

    Raises:
        NoiseKeyError: there is none.
    """
    path = kept_path()
    if not path.exists():
        raise NoiseKeyError(f"there is no key in {home()}")
    with open_register() as register:
        pictures = register.pictures(noise_key().id)
    with home_lock():
        with open(path, "r+b") as file:
            file.write(b"0" * path.stat().st_size)
            file.flush()
            os.fsync(file.fileno())
        path.unlink()
    return (
        f"{path} is deleted. {pictures} pictures were observed with it: nobody can subtract their noise, and no other "
        "key may observe them. Copies and backups of the key, and of the disk, are yours to delete"
    )


def rebuild(stores: Sequence[Path]) -> list[str]:
    """Make the register anew from stores, which are only read. What was there is kept under another name.

    Raises:
        StoreError: a folder that is no store of this format; then nothing was changed.
    """
    plans = []
    for folder in stores:
        plan = read_plan(folder)
        if plan is None:
            raise StoreError(f"{folder} is no store: it has no plan.json")
        plans.append(plan)
    before = new_register()
    lines = [] if before is None else [f"the register that was there is {before} now"]
    with open_register() as register:
        for folder, plan in zip(stores, plans, strict=True):
            first = (lineage_of(plan) or [plan])[0]  # who knows the key of the observations
            wanted = observations_of(plan)
            key_id, store = first.get("key_id"), plan["store_id"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
            seconds = register.add(wanted, key_id=key_id, store=store, folder=folder.resolve(), allowed=True)
            lines.append(f"{folder}: {len(wanted)} observations")
            lines += [f"  {c.pictures} of them were observed in {c.folder} with other noise" for c in seconds]
    return [*lines, f"{register_path()} is made anew; pictures of stores that weren't given are not in it"]
