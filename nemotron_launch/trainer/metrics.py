"""Where a run's numbers and words go: metrics.jsonl, train.log, the terminal, the loggers that are on. Rank 0 only."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.file_errors import file_error
from nemotron_launch.trainer.metric_loggers import MetricLogger, open_loggers
from nemotron_launch.trainer.progress import ConsoleHandler, Progress

log = logging.getLogger(__name__)


@contextlib.contextmanager
def train_log(output_dir: Path) -> Iterator[None]:
    """What the package logs at INFO goes to `train.log`, with the time, and to the terminal; attempts append.

    Inside another one it changes nothing: a run that has words to say before its first number opens it earlier.
    An error that ends the run is written down too. Raises UserError where the folder cannot be written.
    """
    package = logging.getLogger("nemotron_launch")
    if any(isinstance(handler, ConsoleHandler) for handler in package.handlers):
        yield
        return
    before = package.level, package.propagate
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(output_dir / "train.log")
    except OSError as error:
        raise file_error(error) from error
    file.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk: metrics.jsonl will say so
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    console = ConsoleHandler()
    for handler in (file, console):
        package.addHandler(handler)
    package.setLevel(logging.INFO)
    package.propagate = False  # else a library that configures the root logger would show each line twice
    try:
        yield
    except Exception as error:
        package.removeHandler(console)  # there it is printed in the end
        package.error("%s", error, exc_info=not isinstance(error, UserError))
        raise
    finally:
        for handler in (file, console):
            package.removeHandler(handler)
        file.close()
        package.level, package.propagate = before


class MetricsLog:
    """The numbers of one attempt, one call of `log` a step; opens `train.log` too. A context manager.

    `metrics.jsonl` has one JSON object a line: step, epoch, time (Unix seconds), flat keys such as `train/loss`,
    `validation-default/accuracy`, `timing/train/total`, and inside `progress` the run's total_steps. Infinite and NaN
    become null, so that every line is valid JSON.
    Lines after `resume_step` are cut off first, all of them when it is 0: that attempt never happened.

    logger: the config's `logger` section. config: the whole config, for loggers that keep it. enabled: False on all
    ranks but 0, where everything is dropped. Raises UserError when a logger that is on is not installed.
    """

    def __init__(
        self,
        output_dir: Path,
        logger: Mapping[str, Any],
        *,
        resume_step: int = 0,
        config: Mapping[str, Any] | None = None,
        enabled: bool = True,
    ) -> None:
        self._file = -1
        self._loggers: list[MetricLogger] = []
        self._progress = Progress(None)
        self._total: int | None = None
        self._train_log = contextlib.ExitStack()
        if not enabled:
            return
        output_dir.mkdir(parents=True, exist_ok=True)
        self._loggers = open_loggers(logger, output_dir, config=config or {}, resume_step=resume_step)
        self._path = output_dir / "metrics.jsonl"
        cut_back(self._path, resume_step)
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._train_log.enter_context(train_log(output_dir))

    @contextlib.contextmanager
    def progress(self, total_steps: int, start: int) -> Iterator[None]:
        """Show a progress bar meanwhile, if stderr is a terminal."""
        self._total = total_steps
        self._progress = Progress(total_steps, start=start, stream=sys.stderr if self._file >= 0 else None)
        try:
            yield
        finally:
            self._progress.close()

    def log(self, step: int, epoch: int, metrics: Mapping[str, Any]) -> None:
        """Record a step's metrics: numbers of any library, under flat keys or nested by prefix.

        Call it before the step's checkpoint is committed: a resumed run then misses no line and has none twice.
        """
        if self._file < 0:
            return
        flat = flatten(metrics)
        line = {"step": step, "epoch": epoch, "time": round(time.time(), 3), **flat}
        if self._total is not None:
            line["total_steps"] = self._total
        text = json.dumps({key: _finite(value) for key, value in line.items()}, allow_nan=False)
        try:
            os.write(self._file, f"{text}\n".encode())
        except OSError as error:
            raise file_error(error, self._path) from error
        numbers = {key: value for key, value in flat.items() if isinstance(value, int | float)}
        for logger in list(self._loggers):
            try:
                logger.log(step, numbers)
            except Exception as error:
                # A logging server that is gone must not cost the run.
                log.warning("%s takes no more metrics (%s); metrics.jsonl has them all", logger.name, error)
                self._loggers.remove(logger)
        self._progress.show(step, numbers)

    def sync(self) -> None:
        """Bring metrics.jsonl to the disk, before a checkpoint that a power cut must not separate from it."""
        if self._file >= 0:
            os.fsync(self._file)

    def close(self, exit_code: int = 0) -> None:
        """End the loggers, telling them how the run ended, and close the files."""
        for logger in self._loggers:
            try:
                logger.close(exit_code)
            except Exception as error:
                log.warning("%s did not close: %s", logger.name, error)
        self._loggers = []
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._train_log.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(1 if kind else 0)


def cut_back(path: Path, resume_step: int) -> None:
    """Keep the lines up to `resume_step` (none when 0), in one atomic replacement; a torn line goes too."""
    if not path.exists():
        return
    kept = [line for line in path.read_bytes().splitlines() if resume_step > 0 and _step(line) <= resume_step]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.writelines(line + b"\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _step(line: bytes) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train": {"loss": x}}` as `{"train/loss": x}`, numbers of other libraries as Python's."""
    flat: dict[str, Any] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}/"))
        else:
            flat[f"{prefix}{key}"] = value.item() if hasattr(value, "item") else value
    return flat


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
