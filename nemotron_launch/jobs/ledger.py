"""The ledger: every run that was ever submitted, in an SQLite file that many processes use at once."""

from __future__ import annotations

import ctypes
import json
import os
import sqlite3
import stat
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nemotron_launch.errors import UserError
from nemotron_launch.frozen import replace
from nemotron_launch.jobs.run import Run, State
from nemotron_launch.resources import display

FILE = "jobs.db"
LAST = "last"  # the newest run, or the sweep that it is a point of
_PATIENCE = 60.0  # seconds that a command waits for the others
_LISTED = 10  # run ids that a message names
# A row is the run as JSON, which carries every text that a path or a name may be; the columns are what is searched by.
# A script for each version of the file; what a new one changes, older files get when they are opened.
_SCHEMAS = (
    """
CREATE TABLE runs (
    run_id TEXT PRIMARY KEY, sweep TEXT NOT NULL, point INTEGER, created REAL NOT NULL, state TEXT NOT NULL,
    data TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX runs_by_time ON runs (created);
CREATE INDEX runs_by_sweep ON runs (sweep, point) WHERE sweep != '';
CREATE INDEX runs_by_state ON runs (state);
CREATE TABLE locks (name TEXT PRIMARY KEY, holder TEXT NOT NULL, until REAL NOT NULL) WITHOUT ROWID;
""",
    # artifacts: what runs made, see artifacts/registry.py. registered: of each run that has finished, which version its
    # artifacts are; an empty name where it left no record.
    """
CREATE TABLE artifacts (
    name TEXT NOT NULL, version INTEGER NOT NULL, run_id TEXT NOT NULL, step TEXT NOT NULL, digest TEXT NOT NULL,
    created REAL NOT NULL, data TEXT NOT NULL, PRIMARY KEY (name, version)
) WITHOUT ROWID;
CREATE INDEX artifacts_by_digest ON artifacts (digest);
CREATE TABLE registered (run_id TEXT PRIMARY KEY, name TEXT NOT NULL, version INTEGER NOT NULL) WITHOUT ROWID;
""",
)
_VERSION = len(_SCHEMAS)
_INSERT = "INSERT INTO runs (data, state, sweep, point, created, run_id) VALUES (?, ?, ?, ?, ?, ?)"
_UPDATE = "UPDATE runs SET data = ?, state = ?, sweep = ?, point = ?, created = ? WHERE run_id = ?"
_TAKEN = "SELECT 1 FROM runs WHERE run_id = ? UNION ALL SELECT 1 FROM runs WHERE sweep = ? AND sweep != '' LIMIT 1"
_TUPLES = ("overrides", "after", "uses")
_FIELDS = frozenset(Run.__dict__["__dataclass_fields__"])
# statfs(2): ext, XFS, Btrfs, tmpfs, overlayfs, ZFS, F2FS, bcachefs. On any other, NFS or Lustre for example, what
# write-ahead logging keeps in shared memory is not shared.
_LOCAL_FILE_SYSTEMS = {
    0xEF53, 0x58465342, 0x9123683E, 0x01021994, 0x794C7630, 0x2FC12FC1, 0xF2F52010, 0xCA451A4E,
}  # fmt: skip


class RunExists(UserError):
    """The ledger has a run of this id."""


def state_folder() -> Path:
    """Where the ledger lies, and the files of its runs: NEMOTRON_STATE_DIR, else ~/.local/share/nemotron."""
    given = os.environ.get("NEMOTRON_STATE_DIR") or "~/.local/share/nemotron"
    folder = os.path.expanduser(given)
    if folder.startswith("~"):
        raise UserError(f"there is no home folder for {given}", hint="set NEMOTRON_STATE_DIR", exit_code=1)
    return Path(os.path.abspath(folder))


class Ledger:
    """The ledger in a folder, made where it is missing (0700, the file 0600). A context manager.

    Every method raises UserError for a folder or file that cannot be used, and waits for other processes before.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or state_folder()
        self.path = self.folder / FILE
        with self._said():
            _make_private(self.folder, self.path)
            # Transactions are begun by hand: a read must be able to say beforehand that a write follows.
            self._db = sqlite3.connect(self.path, timeout=_PATIENCE, isolation_level=None)
            try:
                self._set_up()
            except BaseException:
                self._db.close()
                raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        with suppress(sqlite3.Error):
            self._db.close()

    # Writing.

    def add(self, runs: Iterable[Run], before: Callable[[], None] = lambda: None) -> None:
        """Add rows, all or none. RunExists: one of the ids is taken, by a run or by a sweep.

        before: called when the ids are known to be free and nobody else can take them; if it raises, nothing is added.
        """
        with self._writing():
            for run in runs:
                if LAST in (run.run_id, run.sweep):
                    raise UserError(f"no run can have the name {LAST}: it means the newest one", where="--run-id")
                if self._exists(run.run_id) or (run.sweep and self._row(run.sweep)):
                    raise RunExists(f"there is a run {run.run_id} already", hint=f"nemotron jobs status {run.run_id}")
                self._put(_INSERT, run)
            before()

    def change(self, run: Run, **changes: Any) -> Run | None:
        """Change a row that is still as the caller knows it: same state, job and attempt; None where it is not."""
        return self.change_all([(run, changes)])[0]

    def change_all(self, changes: Sequence[tuple[Run, dict[str, Any]]]) -> list[Run | None]:
        """`change` for many rows at once."""
        changed: list[Run | None] = []
        with self._writing():
            for run, values in changes:
                now = self._row(run.run_id)
                if now is None or (now.state, now.job_id, now.attempt) != (run.state, run.job_id, run.attempt):
                    changed.append(None)
                    continue
                new = replace(now, **values)
                changed.append(new)
                self._put(_UPDATE, new)
        return changed

    def remove(self, run_ids: Iterable[str]) -> None:
        """Forget runs; what they made stays known, as it stays where it is."""
        with self._writing():
            forgotten = [(run_id,) for run_id in run_ids]
            self._db.executemany("DELETE FROM runs WHERE run_id = ?", forgotten)
            self._db.executemany("DELETE FROM registered WHERE run_id = ?", forgotten)

    @contextmanager
    def lock(self, name: str, holder: str, alive: Callable[[str], bool], *, seconds: float = 600) -> Iterator[bool]:
        """Whether this process has the lock, of all that ask for it; it does not wait. alive: whether a holder lives.

        After `seconds` a lock counts as left behind, for holders on machines that cannot be asked.
        """
        with self._writing():
            row = self._db.execute("SELECT holder, until FROM locks WHERE name = ?", (name,)).fetchone()
            free = row is None or row[1] < time.time() or not alive(row[0])
            if free:
                values = (name, holder, time.time() + seconds)
                self._db.execute("INSERT OR REPLACE INTO locks (name, holder, until) VALUES (?, ?, ?)", values)
        try:
            yield free
        finally:
            if free:
                with self._writing():
                    self._db.execute("DELETE FROM locks WHERE name = ? AND holder = ?", (name, holder))

    # Reading.

    def get(self, run_id: str) -> Run | None:
        """The run of exactly this id."""
        with self._said():
            return self._row(run_id)

    def runs(
        self,
        *,
        states: Collection[State] = (),
        sweep: str | None = None,
        limit: int | None = None,
        where: Callable[[Run], bool] = lambda run: True,
    ) -> list[Run]:
        """Runs, newest first; points of a sweep in their order. sweep: its points only. limit: of what is found."""
        terms, values = ["1"], list[Any]()
        if states:
            terms.append(f"state IN ({', '.join('?' * len(states))})")
            values += states
        if sweep is not None:
            terms.append("sweep = ?")
            values.append(_plain(sweep))
        found: list[Run] = []
        query = f"SELECT data FROM runs WHERE {' AND '.join(terms)} ORDER BY created DESC, sweep, point, run_id"
        with self._said():
            for (data,) in self._db.execute(query, values):
                if limit is not None and len(found) >= limit:
                    break
                run = _read(data)
                if where(run):
                    found.append(run)
        return found

    def find(self, text: str) -> list[Run]:
        """The run that a person names: its id, the unique start of one, or `last`. Of a sweep: all its points.

        UserError: none, or several.
        """
        with self._said():
            if text == LAST:
                newest = self._db.execute("SELECT data FROM runs ORDER BY created DESC, point LIMIT 1").fetchone()
                if newest is None:
                    raise UserError("there are no runs yet", hint="nemotron steps run ID -b PROFILE submits one")
                run = _read(newest[0])
                return self.runs(sweep=run.sweep) if run.sweep else [run]
            if run_ := self._row(text):
                return [run_]
            if points := self.runs(sweep=text) if text else []:
                return points
            return self._by_prefix(text)

    def names(self, prefix: str = "") -> list[str]:
        """Ids of runs and sweeps that begin so, newest first."""
        query = """
            SELECT name FROM (
                SELECT run_id AS name, created FROM runs
                UNION ALL SELECT sweep AS name, max(created) FROM runs WHERE sweep != '' GROUP BY sweep
            ) WHERE substr(name, 1, ?) = ? ORDER BY created DESC, length(name)
        """
        with self._said():
            return [name for (name,) in self._db.execute(query, (len(prefix), _plain(prefix)))]

    def _by_prefix(self, text: str) -> list[Run]:
        names = self.names(text) if text else []
        # The points of a sweep begin as it does: it counts once.
        whole = [name for name in names if name.rpartition(".")[0] not in names]
        if len(whole) == 1:
            return self.find(whole[0])
        if whole:
            shown = "\n".join(whole[:_LISTED]) + ("\n…" if len(whole) > _LISTED else "")
            raise UserError(f"{text} is the start of {len(whole)} run ids", hint=shown)
        from difflib import get_close_matches

        near = get_close_matches(text, self.names(), n=1)
        raise UserError(
            f"there is no run {text!r}",
            hint=(f"did you mean {near[0]}?" if near else "nemotron jobs list shows the runs"),
        )

    # For what else is kept in the same file.

    def query(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        """The rows that a SELECT finds."""
        with self._said():
            return self._db.execute(statement, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[Callable[..., sqlite3.Cursor]]:
        """Changes that are made together or not at all; yields what executes a statement with its values."""
        with self._writing():
            yield self._db.execute

    # SQLite.

    def _set_up(self) -> None:
        wanted = "wal" if on_local_file_system(self.folder) else "delete"
        (mode,) = self._db.execute("PRAGMA journal_mode").fetchone()
        if mode != wanted:
            self._patiently(f"PRAGMA journal_mode = {wanted}")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version < _VERSION:
            with self._writing():
                (version,) = self._db.execute("PRAGMA user_version").fetchone()
                for script in _SCHEMAS[version:]:  # those that nobody else has run meanwhile
                    for statement in script.split(";"):
                        self._db.execute(statement)
                if version < _VERSION:
                    self._db.execute(f"PRAGMA user_version = {_VERSION}")
        elif version > _VERSION:
            hint = "update nemotron, or let NEMOTRON_STATE_DIR name another folder"
            raise UserError("was written by a newer nemotron", where=display(self.path), hint=hint, exit_code=1)

    def _patiently(self, statement: str) -> None:
        """SQLite does not wait by itself when the journal's mode changes."""
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                self._db.execute(statement)
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(0.02)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A transaction that has the right to write from its start: one that takes it later may be refused."""
        with self._said():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                with suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextmanager
    def _said(self) -> Iterator[None]:
        hint = "the ledger of runs; NEMOTRON_STATE_DIR names another folder for it"
        try:
            yield
        except sqlite3.Error as error:
            text = str(error)
            if "not a database" in text or "malformed" in text:
                hint = (
                    f"the ledger of runs is damaged; to begin a new one, move it away:  mv {self.path} {self.path}.old"
                )
            raise UserError(text, where=display(self.path), hint=hint, exit_code=1) from None
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            where = display(Path(error.filename or self.path))
            raise UserError(f"cannot be used: {reason}", where=where, hint=hint, exit_code=1) from None

    def _row(self, run_id: str) -> Run | None:
        found = self._db.execute("SELECT data FROM runs WHERE run_id = ?", (_plain(run_id),)).fetchone()
        return _read(found[0]) if found else None

    def _exists(self, name: str) -> bool:
        query = (
            "SELECT 1 FROM runs WHERE run_id = ? UNION ALL SELECT 1 FROM runs WHERE sweep = ? AND sweep != '' LIMIT 1"
        )
        return self._db.execute(query, (_plain(name), _plain(name))).fetchone() is not None

    def _put(self, statement: str, run: Run) -> None:
        values = (_written(run), run.state, _plain(run.sweep), run.point, run.created, _plain(run.run_id))
        self._db.execute(statement, values)


def on_local_file_system(folder: Path) -> bool:
    """Whether a folder is known to lie on a file system of this machine alone."""
    if sys.platform != "linux":
        return False
    buffer = (ctypes.c_long * 64)()
    statfs = ctypes.CDLL(None, use_errno=True).statfs
    return statfs(os.fsencode(folder), buffer) == 0 and buffer[0] & 0xFFFFFFFF in _LOCAL_FILE_SYSTEMS


def _make_private(folder: Path, file: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    if stat.S_IMODE(file.stat().st_mode) & 0o077:
        file.chmod(0o600)


def _plain(text: str) -> str:
    """What SQLite can compare: no run id has anything else in it."""
    return text.encode("utf-8", "replace").decode()


def _written(run: Run) -> str:
    return json.dumps(vars(run), default=dict)


def _read(data: str) -> Run:
    """A row as a run; what a later version may have added to it is left out."""
    values = {key: value for key, value in json.loads(data).items() if key in _FIELDS}
    return Run(**values | {key: tuple(values[key]) for key in _TUPLES if key in values})
