"""What is read of runs: metrics, config, samples, through their hosts; of remote ones a copy is kept and added to."""

from __future__ import annotations

import json
import os
import posixpath
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nemotron_launch.errors import UserError
from nemotron_launch.hosts import Host
from nemotron_launch.hosts.here import Here
from nemotron_launch.jobs.run import LIVE, Run
from nemotron_launch.jobs.settle import Backends, Warn
from nemotron_launch.reports.metrics_file import MetricsFile
from nemotron_launch.reports.parts import read_long
from nemotron_launch.resources import display

METRICS, SAMPLES, CONFIG = "metrics.jsonl", "samples.jsonl", "config.yaml"
CACHE = "reports"  # below the state folder: a folder a run, which `jobs prune` removes
_PIECE = 16 << 20  # bytes of a file that one call reads
_SAMPLES_KEPT = 1 << 20  # bytes at the end of samples.jsonl that are read: some thousand answers


class RunFiles:
    """The files of one run, as far as they have been read. `update` reads what has come since.

    run: None for a folder that no ledger knows. host: None where the folder cannot be read from here. cache: where the
    copy of a remote run's metrics is kept; None keeps none.
    """

    def __init__(
        self, name: str, output_dir: str, host: Host | None, *, run: Run | None = None, cache: Path | None = None
    ) -> None:
        self.name = name
        self.output_dir = output_dir
        self.host = host
        self.run = run
        self.config_text = ""
        self.samples: list[dict[str, Any]] = []
        self.there: bool | None = None  # whether the output folder is; None before it was looked at
        self._cache = cache / METRICS if cache else None
        self._metrics = MetricsFile(METRICS)
        self._samples_size = 0
        self._read_cache()

    def metrics(self) -> MetricsFile:
        """The numbers read so far. It is replaced, not emptied, when the file has been cut back."""
        return self._metrics

    @property
    def over(self) -> bool:
        return self.run is None or self.run.state not in LIVE

    def path(self, name: str) -> str:
        return posixpath.join(self.output_dir, name)

    @property
    def configs(self) -> list[str]:
        """Where its config may lie: among the run's own files, or beside its metrics."""
        own = [posixpath.join(self.run.state_dir, CONFIG)] if self.run else []
        return [*own, self.path(CONFIG)]

    # What `update` reads, and what it brings.

    def _wanted(self) -> dict[str, int]:
        """Where to go on reading metrics: a few bytes before the end, to see whether it is still the same file."""
        return {self.path(METRICS): self._metrics.offset - len(self._metrics.tail)}

    def _take(self, data: bytes) -> bool:
        """Take what was read behind `_wanted`; whether there may be more."""
        tail = self._metrics.tail
        if not data.startswith(tail):  # cut back by a restart, or replaced
            self._metrics = MetricsFile(METRICS)
            self._drop_cache()
            return True
        new = data[len(tail) :]
        self._metrics.feed(new)
        self._write_cache(new)
        if self.over and len(data) < _PIECE:
            self._metrics.end()
        return len(data) >= _PIECE

    def _read_cache(self) -> None:
        if self._cache is None:
            return
        read_long(self._metrics, self._cache)
        with suppress(OSError), self._cache.open("rb") as file:
            file.seek(self._metrics.offset)
            while piece := file.read(_PIECE):
                self._metrics.feed(piece)

    def _write_cache(self, new: bytes) -> None:
        if self._cache is None or not new:
            return
        try:  # a copy that cannot be kept is only read again
            self._cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._cache.open("ab") as file:
                if file.tell() == self._metrics.offset - len(new):  # else another process has added to it
                    file.write(new)
        except OSError:
            self._cache = None

    def _drop_cache(self) -> None:
        if self._cache is not None:
            with suppress(OSError):
                self._cache.unlink(missing_ok=True)


def open_runs(backends: Backends, runs: Sequence[Run], state: Path) -> list[RunFiles]:
    """The files of runs of the ledger, nothing read yet. state: the ledger's folder."""
    found = []
    for run in runs:
        host = backends.of(run).host
        remote = host is not None and host.name
        cache = state / CACHE / run.run_id if remote else None
        found.append(RunFiles(run.run_id, run.output_dir, host, run=run, cache=cache))
    return found


def forget_copies(state: Path, run_ids: Iterable[str]) -> None:
    """Remove what is kept of remote runs' metrics. state: the ledger's folder."""
    for run_id in run_ids:
        shutil.rmtree(state / CACHE / run_id, ignore_errors=True)


def open_folder(folder: Path) -> RunFiles:
    """The files of a run that no ledger knows, by its output folder. UserError: there is none, or no run's."""
    if folder.name == METRICS and folder.is_file():
        folder = folder.parent
    if not (folder / METRICS).is_file():
        what = "holds no metrics.jsonl" if folder.is_dir() else "there is no such folder"
        what = "is no folder" if folder.is_file() else what
        raise UserError(what, where=display(folder), hint="a run's output folder is what its output_dir names")
    folder = folder.absolute()
    return RunFiles(folder.name, str(folder), Here())


def update(files: Iterable[RunFiles], warn: Warn) -> None:
    """Read what runs have written since the last time, those of a host in one call.

    A host that is out of reach is a warning, and what was read before stays.
    """
    by_host: dict[int, list[RunFiles]] = {}
    for one in files:
        if one.host is not None:
            by_host.setdefault(id(one.host), []).append(one)
    for group in by_host.values():
        host = group[0].host
        assert host is not None
        try:
            _update_metrics(host, group)
            _update_small(host, group)
        except UserError as error:
            these = group[0].name if len(group) == 1 else f"{len(group)} runs"
            warn(f"{error.message}: what is shown of {these} may be old")


def _update_metrics(host: Host, group: Sequence[RunFiles]) -> None:
    if not host.name:
        for one in group:
            if not one.metrics().offset:
                read_long(one.metrics(), Path(one.path(METRICS)))
    left = list(group)
    while left:
        asked = {one.path(METRICS): offset for one in left for offset in one._wanted().values()}
        read = host.read(asked, limit=_PIECE)
        # A file that is gone is as one that was emptied: what its run says now is nothing.
        left = [one for one in left if one._take(read.get(one.path(METRICS), b"")) and one.path(METRICS) in read]


def _update_small(host: Host, group: Sequence[RunFiles]) -> None:
    """Configs, once, and the ends of the samples."""
    sizes: dict[str, int] = {}
    for one in group:
        entries = host.entries(one.output_dir)
        one.there = entries is not None
        for entry in entries or ():
            if entry.name == SAMPLES and entry.size != one._samples_size:
                sizes[one.path(SAMPLES)] = entry.size
    wanted = {path: 0 for one in group if not one.config_text for path in one.configs}
    wanted |= {path: max(0, size - _SAMPLES_KEPT) for path, size in sizes.items()}
    read = host.read(wanted, limit=_SAMPLES_KEPT) if wanted else {}
    for one in group:
        if text := next((read[path] for path in one.configs if read.get(path)), b""):
            one.config_text = text.decode(errors="replace")
        path = one.path(SAMPLES)
        if path in read:
            one._samples_size = sizes[path]
            one.samples = _samples(read[path], whole=sizes[path] <= _SAMPLES_KEPT)


def _samples(data: bytes, *, whole: bool) -> list[dict[str, Any]]:
    """The lines that can be read; without the first where the piece begins in the middle of one."""
    found = []
    for line in data.split(b"\n")[0 if whole else 1 :]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def find_files(backends: Backends, ledger: Any, names: Sequence[str], warn: Warn) -> list[RunFiles]:
    """The files of the runs that a person names, each once: runs and sweeps of the ledger, or folders with metrics.

    A name with a slash in it, or of a folder that holds metrics.jsonl and is no run's, is a folder.
    """
    from nemotron_launch.jobs.status import refresh

    found: dict[str, RunFiles] = {}
    for name in names:
        if os.sep in name or name in (".", "..") or (Path(name, METRICS).is_file() and ledger.get(name) is None):
            one = open_folder(Path(name).expanduser())
            found.setdefault(one.output_dir, one)  # no run id begins with a slash
            continue
        runs = [known.run for known in refresh(ledger, backends, ledger.find(name), warn)]
        for one in open_runs(backends, runs, ledger.folder):
            found.setdefault(one.name, one)
    return list(found.values())


def missing(one: RunFiles) -> UserError | None:
    """What to say of a run of which there are no metrics; None where there are."""
    if one.metrics().names:
        return None
    run = one.run
    if one.host is None:
        return UserError(f"the folder of {one.name} cannot be read from here", exit_code=1)
    if one.there is False and one.over:
        hint = "it was removed, or moved; the ledger keeps the run's row:  nemotron jobs status " + one.name
        return UserError(f"the output of {one.name} is gone", where=one.output_dir, hint=hint, exit_code=1)
    if problems := one.metrics().problems:
        where = posixpath.join(one.output_dir, problems[0].partition(": ")[0])
        return UserError(f"nothing in the metrics of {one.name} can be read", where=where, exit_code=1)
    if run and run.state == "finished" and one.there:
        return None  # a step that writes none: there is its config, and what it made
    state = f"is {run.state} and " if run else ""
    return UserError(f"{one.name} {state}has no metrics yet", where=one.path(METRICS), exit_code=1)


def config_of(one: RunFiles) -> Mapping[str, Any]:
    """The run's composed config; empty where there is none that can be read."""
    import yaml

    try:
        loaded = yaml.load(one.config_text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}
