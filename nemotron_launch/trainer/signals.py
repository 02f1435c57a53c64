"""The wish to stop, as signals bring it to a training process, and how all ranks come to act on it at the same step."""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Callable
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Notes the signals that ask for a stop; training goes on until the ranks agree at a step's end to save and leave.

    any_rank: a collective over all ranks that says whether the flag is set on any (an all-reduce with MAX);
    without it this process is alone. Signals reach the ranks at different moments, some only one of them, so no rank
    may act on its own flag. A second SIGINT interrupts at once. SIGUSR2 prints the stacks of all threads to stderr.
    Make one in the main thread; use it as a context manager to give the former handlers back.
    """

    def __init__(self, any_rank: Callable[[bool], bool] | None = None) -> None:
        self._any_rank = any_rank
        self._noted: signal.Signals | None = None
        self.stop_step: int | None = None
        self._before = {signo: signal.signal(signo, self._note) for signo in STOP_SIGNALS}
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)

    def _note(self, signo: int, _frame: FrameType | None) -> None:
        self._noted = signal.Signals(signo)
        if signo == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def over(self, any_rank: Callable[[bool], bool]) -> None:
        """From now on agree by `any_rank`: the request is made first, the process groups exist later."""
        self._any_rank = any_rank

    @property
    def signal_name(self) -> str | None:
        """The signal that this rank got last, "SIGTERM" for example; None when it got none."""
        return self._noted.name if self._noted else None

    def agree(self, flag: bool, step: int) -> bool:
        """Whether to save and stop after `step`; all ranks must ask at the same steps, and get the same answer.

        flag: another reason of this rank to stop, such as too little time left. Once yes, always yes;
        `stop_step` is the step of the first yes.
        """
        if self.stop_step is None:
            wish = flag or self._noted is not None
            if self._any_rank(wish) if self._any_rank else wish:
                self.stop_step = step
        return self.stop_step is not None

    def close(self) -> None:
        """Give the former handlers back."""
        for signo, handler in self._before.items():
            signal.signal(signo, handler)
        faulthandler.unregister(signal.SIGUSR2)
        # Not the default action, which would end the process: a late SIGUSR2 must do no harm.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
