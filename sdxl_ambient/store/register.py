"""The register of observations: which pictures this user has observed, with what noise, and in which stores.

One SQLite file beside the noise key. A row says that a picture was, or was about to be, observed at a level, in a store. The
picture stands there as a keyed hash of its content, under a key that lies beside the register: no name or path of a picture
is in it, no pixel, and nothing that pictures could be compared by. Rows are written before the noise is drawn, so that an
interruption leaves too many rows and never too few.

Two observations of a picture tell more than one unless they lie on one noise path: the same kept key, and a latent that is
made in the same way.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from sdxl_ambient.errors import RegisterError
from sdxl_ambient.home import home, home_lock, private_home, secret_file

FILE = "observations.sqlite"
SECRET = "register.key"
KEPT = "noise.key"  # the key that is used by default
_WAIT = 60  # seconds for another process that writes
_TABLE = """
CREATE TABLE IF NOT EXISTS observations (
    picture TEXT NOT NULL,   -- keyed hash of its content
    latent TEXT NOT NULL,    -- hash of what its latent is: VAE, schedule, size, crop
    key_id TEXT NOT NULL,    -- '' for a key that is kept nowhere
    t_n INTEGER NOT NULL,
    store TEXT NOT NULL,     -- id of the store
    folder TEXT NOT NULL,    -- where it was then
    at TEXT NOT NULL,        -- UTC
    second INTEGER NOT NULL, -- 1 where --allow_second_observation let it be
    PRIMARY KEY (picture, latent, key_id, t_n, store)
) WITHOUT ROWID
"""
# Another path: another latent, another key, or a key that was never kept and so can't be the same. A store may go on with
# its own rows where it lies, for what they announce wasn't drawn yet.
_CONFLICTS = """
SELECT o.folder, COUNT(DISTINCT o.picture), MIN(o.at), MAX(o.latent != w.latent)
FROM wanted w JOIN observations o ON o.picture = w.picture
WHERE (o.latent != w.latent OR o.key_id != :key_id OR o.key_id = '') AND NOT (o.store = :store AND :own)
GROUP BY o.folder ORDER BY 3
"""


@dataclass(frozen=True)
class Observation:
    """A picture, by the hash of its content; what its latent is, as a hash; and its level."""

    content: str
    latent: str
    t_n: int


@dataclass(frozen=True)
class Conflict:
    """An earlier store with other noise for some of the pictures that are wanted now."""

    folder: str
    pictures: int
    since: str
    other_latent: bool  # another VAE, schedule, size or crop; else another key


@dataclass(frozen=True)
class StoreRow:
    """What the register has of one store: its observations by key and level."""

    store: str
    folder: str
    key_id: str | None
    levels: dict[int, int]  # how many pictures at each
    since: str
    second: bool


def register_path() -> Path:
    return home() / FILE


class Register:
    """The open register. Use it through :func:`open_register`."""

    def __init__(self, connection: sqlite3.Connection, key: bytes):
        self._db, self._key = connection, key

    def add(
        self,
        wanted: Sequence[Observation],
        *,
        key_id: str | None,
        store: str,
        folder: Path,
        allowed: bool = False,
        before: Callable[[list[Conflict]], None] = lambda conflicts: None,
    ) -> list[Conflict]:
        """Announce observations that are about to be drawn, all or none.

        Returns the earlier stores that hold other noise for some of the pictures. Where there are any and they aren't
        ``allowed``, nothing is written; where they are, the rows say so. ``before`` is called when they may be drawn and no
        row is there yet: a store that the rows name is on disk, and goes on under its name, whenever the run is killed.
        """
        with self._writing():
            conflicts = self._conflicts(wanted, key_id, store, folder)
            if conflicts and not allowed:
                return conflicts
            before(conflicts)
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            rows = (
                (self._hashed(o.content), o.latent, key_id or "", o.t_n, store, str(folder), now, int(bool(conflicts)))
                for o in wanted
            )
            self._db.executemany("INSERT OR IGNORE INTO observations VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
        return conflicts

    def unannounced(
        self, wanted: Sequence[Observation], *, key_id: str | None, store: str, folder: Path
    ) -> list[Observation]:
        """Those that this store, where it lies, hasn't announced yet."""
        query = "SELECT picture, latent, t_n FROM observations WHERE store = ? AND key_id = ?"
        if not self._is_there(store, folder):
            return list(wanted)
        rows = set(self._read(query, (store, key_id or "")))
        return [o for o in wanted if (self._hashed(o.content), o.latent, o.t_n) not in rows]

    def stores(self) -> list[StoreRow]:
        """Every store that the register knows, the oldest first."""
        found: dict[tuple[str, str, str], StoreRow] = {}
        query = """SELECT store, folder, key_id, t_n, COUNT(*), MIN(at), MAX(second) FROM observations
                   GROUP BY store, folder, key_id, t_n ORDER BY 6, 2, 4"""
        for store, folder, key_id, t_n, count, since, second in self._read(query):
            row = found.setdefault((store, folder, key_id), StoreRow(store, folder, key_id or None, {}, since, bool(second)))
            row.levels[t_n] = count
        return list(found.values())

    def pictures(self, key_id: str | None) -> int:
        """How many pictures were observed with a key; with None, how many in all."""
        clause, values = ("", ()) if key_id is None else (" WHERE key_id = ?", (key_id,))
        return next(iter(self._read("SELECT COUNT(DISTINCT picture) FROM observations" + clause, values)))[0]

    def dump(self) -> list[tuple]:
        """Every row, for a backup."""
        return self._read("SELECT * FROM observations")

    def load(self, rows: Sequence[tuple]) -> None:
        """Rows of a backup."""
        with self._writing():
            self._db.executemany("INSERT OR IGNORE INTO observations VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def _read(self, query: str, values: Iterable = ()) -> list:
        try:
            return self._db.execute(query, tuple(values)).fetchall()
        except sqlite3.Error as error:
            raise _unreadable(error) from None

    def _conflicts(self, wanted: Sequence[Observation], key_id: str | None, store: str, folder: Path) -> list[Conflict]:
        self._db.execute("CREATE TEMP TABLE IF NOT EXISTS wanted (picture TEXT, latent TEXT)")
        self._db.execute("DELETE FROM wanted")
        self._db.executemany("INSERT INTO wanted VALUES (?, ?)", ((self._hashed(o.content), o.latent) for o in wanted))
        own = self._is_there(store, folder)
        values: Mapping[str, object] = {"key_id": key_id or "", "store": store, "own": own}
        rows = self._db.execute(_CONFLICTS, values).fetchall()
        return [Conflict(folder, count, since, bool(latent)) for folder, count, since, latent in rows]

    def _is_there(self, store: str, folder: Path) -> bool:
        """Whether a store is where the register has it, or was moved here. A copy beside it would draw once more."""
        known = {
            Path(path) for (path,) in self._db.execute("SELECT DISTINCT folder FROM observations WHERE store = ?", (store,))
        }
        return all(path == folder or not (path / "plan.json").exists() for path in known)

    def _hashed(self, content: str) -> str:
        return hmac.new(self._key, content.encode(), hashlib.sha256).hexdigest()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction, which no other process's overlaps."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            raise _unreadable(error) from None


@contextmanager
def open_register(make: bool = False) -> Iterator[Register]:
    """The user's register, made where this user has neither register nor keys, or where it is to be made anew.

    Raises:
        RegisterError: it is lost, damaged, or can't be written.
    """
    with home_lock():
        path, key = register_path(), private_home() / SECRET
        # A key's file is made after the register.
        if not make and not path.exists() and (key.exists() or (home() / KEPT).exists()):
            raise RegisterError(f"the register of observations {str(path)!r} is lost. {_REBUILD}")
        new = not path.exists()
        try:
            connection = sqlite3.connect(path, timeout=_WAIT, isolation_level=None)
            if new:
                os.chmod(path, 0o600)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            damage = connection.execute("PRAGMA quick_check").fetchone()[0]
            connection.execute(_TABLE)
            if damage != "ok":
                raise sqlite3.DatabaseError(damage)
            if not key.exists() and connection.execute("SELECT 1 FROM observations").fetchone():
                raise sqlite3.DatabaseError(f"its key {SECRET} is lost")
        except sqlite3.Error as error:
            raise _unreadable(error) from None
        hashing = secret_file(key)
    with closing(connection):
        yield Register(connection, hashing)


_REBUILD = (
    "Make it anew from the stores that you have: python -m sdxl_ambient.key rebuild STORE …; without it a second "
    "observation of a picture can't be found"
)


def _unreadable(error: sqlite3.Error) -> RegisterError:
    if isinstance(error, sqlite3.OperationalError):  # a full disk, a lock, no permission: nothing is damaged
        return RegisterError(f"the register of observations {str(register_path())!r} can't be used: {error}")
    return RegisterError(f"the register of observations {str(register_path())!r} can't be used ({error}). {_REBUILD}")


def new_register() -> Path | None:
    """Make an empty register. What was there is kept under another name, which is returned."""
    with home_lock():
        path, aside = register_path(), None
        if path.exists():
            stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S")
            aside = path.with_name(f"{path.stem}.before-{stamp}{path.suffix}")
            os.replace(path, aside)
        for name in (f"{FILE}-wal", f"{FILE}-shm", SECRET):
            (path.parent / name).unlink(missing_ok=True)
    with open_register(make=True):
        return aside
