"""What a terminal shows of a preparation: a bar for its stage, or in a pipe a line now and then."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any, TextIO

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class Bar:
    """The stages of a preparation, one after the other. stream: where the bar goes if that is a terminal."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._bar: Any = None
        self._task: Any = None
        self._next = time.monotonic() + SECONDS_BETWEEN_LINES
        self._stage, self._total, self._done = "", 1.0, 0.0

    def stage(self, name: str, total: float = 1.0) -> None:
        """Begin a stage of so much to do."""
        self._stage, self._total, self._done = name, max(total, 1e-9), 0.0
        if not self._stream.isatty():
            return
        if self._bar is None:
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=None),
                progress.TaskProgressColumn(),
                progress.TimeRemainingColumn(compact=True),
                console=Console(file=self._stream),
                transient=True,
            )
            self._bar.start()
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(name, total=self._total)

    def advance(self, amount: float) -> None:
        self.at(self._done + amount)

    def at(self, done: float) -> None:
        """So much of the stage is done."""
        self._done = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + SECONDS_BETWEEN_LINES
            log.info("%s: %d%%", self._stage, min(100, 100 * done / self._total))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
