"""What a terminal shows of a run: a progress bar with messages above it, or, in a pipe, a line now and then."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
# What a step's line shows of `train/…`, as far as the step has it.
SHOWN = ("loss", "reward", "accuracy", "policy_accuracy")
# How the loops name their speed; the first that a step has is shown.
SPEED_KEYS = ("timing/train/tokens_per_sec", "timing/train/valid_tokens_per_sec_per_gpu")


class ConsoleHandler(logging.Handler):
    """Log messages on stderr. Of the steps' own lines a terminal shows none (it has the bar), a pipe one in 10 s."""

    def __init__(self) -> None:
        super().__init__()
        self._next_line = 0.0
        self._terminal = sys.stderr.isatty()
        if not self._terminal:
            self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "is_step", False):
            now = time.monotonic()
            if self._terminal or now < self._next_line:
                return
            self._next_line = now + SECONDS_BETWEEN_LINES
        # sys.stderr as it is now: while the bar is shown, it stands for "above the bar".
        print(self.format(record), file=sys.stderr, flush=True)


class Progress:
    """The bar of one attempt, on `stream` if that is a terminal; and the log's line for every step.

    total: the last step, or None if not known. start: the step from which it goes on.
    """

    def __init__(self, total: int | None, *, start: int = 0, stream: TextIO | None = None) -> None:
        self._total = total
        self._bar: Any = None
        if stream and stream.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn(
                    "step {task.completed:.0f}/{task.total:.0f}" if total else "step {task.completed:.0f}"
                ),
                progress.BarColumn(bar_width=None),
                progress.TextColumn("{task.fields[numbers]}", markup=False),
                progress.TimeRemainingColumn(compact=True),
                console=Console(file=stream),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=total, completed=start, numbers="")

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """One step is done; metrics: flat keys, as in metrics.jsonl."""
        numbers = _numbers(metrics)
        if self._bar:
            self._bar.update(self._task, completed=step, numbers=numbers)
        if numbers:
            of = f"/{self._total}" if self._total else ""
            log.info("step %d%s  %s", step, of, numbers, extra={"is_step": True})
        for section in sorted({key.split("/")[0] for key in metrics if key.startswith("validation")}):
            values = {key.removeprefix(f"{section}/"): metrics[key] for key in metrics if key.startswith(f"{section}/")}
            text = "  ".join(f"{key} {_short(value)}" for key, value in values.items())
            log.info("step %d  %s: %s", step, section, text)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


def _numbers(metrics: Mapping[str, float]) -> str:
    parts = [f"{name} {_short(metrics[f'train/{name}'])}" for name in SHOWN if f"train/{name}" in metrics]
    parts += [f"{metrics[key]:,.0f} tokens/s" for key in SPEED_KEYS if key in metrics][:1]
    return "  ".join(parts)


def _short(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
