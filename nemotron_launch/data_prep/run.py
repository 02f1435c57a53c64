"""The process of data_prep/rl_prep: config in, exit code out, errors and signals in one place."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType

from nemotron_launch.artifacts import record
from nemotron_launch.data_prep import engine
from nemotron_launch.errors import UserError
from nemotron_launch.trainer import exit_codes, output_lock
from nemotron_launch.trainer.config_file import read_config
from nemotron_launch.trainer.metrics import train_log

log = logging.getLogger(__name__)


class _Stopped(BaseException):
    """A signal asked for the end; what is done is kept."""


def main(step_dir: Path, argv: list[str] | None = None) -> int:
    """Prepare as --config says; the exit code: 0, 1 failed, 2 bad input, 85 stopped and to be started again."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True, help="the composed config")
    path: Path = parser.parse_args(argv).config
    for signo in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(signo, _stop)
    try:
        config = read_config(path)
        folder = Path(config["output_dir"]).expanduser()
        with train_log(folder), output_lock.hold(folder):
            made = engine.prepare(config, step_dir)
            log.info("manifest: %s", made)
            record.register_finished(step_dir, config, config_path=path)
        return exit_codes.FINISHED
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    except _Stopped as stopped:
        print(f"{stopped}: start the same command again to go on", file=sys.stderr, flush=True)
        return exit_codes.RESUME_ME
    except Exception:
        traceback.print_exc()
        return exit_codes.FAILED


def _stop(signo: int, _frame: FrameType | None) -> None:
    raise _Stopped(f"stopped by {signal.Signals(signo).name}")
