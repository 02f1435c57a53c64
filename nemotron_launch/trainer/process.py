"""One process of a step: config in, exit code out, and the one place where its errors are printed."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nemotron_launch.artifacts import record
from nemotron_launch.errors import UserError
from nemotron_launch.trainer import exit_codes
from nemotron_launch.trainer.agreement import SharedError
from nemotron_launch.trainer.config_file import read_config
from nemotron_launch.trainer.megatron import parallel
from nemotron_launch.trainer.metrics import train_log

Config = Mapping[str, Any]


def run_process(step_dir: Path, work: Callable[[Config], int], argv: list[str] | None = None) -> int:
    """The body of a step's entry point: reads --config, does the work, and returns the attempt's exit code.

    A UserError is printed, without its stack; anything else is a defect of ours and shows it. Both are in train.log.
    What a finished run made is recorded beside it.
    """
    # megatron-core warns of its own deprecations and of every optional package that is not there.
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed\.")
    rank = int(os.environ.get("RANK", "0"))
    try:
        config_path = _arguments(argv).config
        config = read_config(config_path)
        with train_log(Path(config["output_dir"])) if rank == 0 else contextlib.nullcontext():
            code = work(config)
            if code == exit_codes.FINISHED and rank == 0:
                record.register_finished(step_dir, config, config_path=config_path)
            return code
    except UserError as error:
        if rank > 0 and isinstance(error, SharedError):
            time.sleep(2)  # rank 0 says it, and spawn takes the first to end for the cause
        else:
            print(error, file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        return exit_codes.FAILED
    finally:
        if sys.exc_info()[0] is None:
            parallel.stop()


def process_start() -> float:
    """When this process began, as time.monotonic() counts; importing the libraries has taken a while since."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # field 22, since the boot
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True, help="the composed config")
    return parser.parse_args(argv)
