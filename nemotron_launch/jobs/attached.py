"""Records runs of this machine's terminal in the ledger, which must never keep one from running."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from nemotron_launch.backends.live import Seen
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import replace
from nemotron_launch.job import Job
from nemotron_launch.jobs.ledger import Ledger, RunExists
from nemotron_launch.jobs.submission import new_run


@contextmanager
def recorded(job: Job, overrides: Sequence[str], **fields: str) -> Iterator[Callable[[Seen], None]]:
    """Add the run to the ledger; what is yielded writes down its end. RunExists: the id is taken.

    fields: more of the row, such as the stage that it is. A ledger that cannot be used is a warning.
    """
    run = replace(new_run(job, overrides), state="running", job_id=str(os.getpid()), started=time.time())
    run = replace(run, submitted=run.started, **fields)
    try:
        with Ledger() as ledger:
            ledger.add([run])
    except RunExists:
        raise
    except UserError as error:
        print(f"warning: this run is not recorded: {str(error).removeprefix('error: ')}", file=sys.stderr, flush=True)
        yield lambda seen: None
        return

    def ended(seen: Seen) -> None:
        try:
            with Ledger() as ledger:
                values = {"state": seen.state, "exit_code": seen.exit_code, "reason": seen.reason, "ended": seen.ended}
                now = ledger.change(run, **values)
                if now and now.state == "finished":
                    from nemotron_launch.artifacts.registry import register
                    from nemotron_launch.hosts import open_host

                    register(ledger, open_host({}), [now])
        except UserError:
            pass  # the run's folder says it too

    yield ended
