"""Two runs never write into one output folder."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemotron_launch.errors import UserError
from nemotron_launch.trainer import output_lock

AT_ONCE = (0.0, 0.0)

# Holds the folder; with "orphan", in a child that outlives it.
HOLD = """
import subprocess, sys, time
from pathlib import Path
from nemotron_launch.trainer import output_lock
with output_lock.hold(Path(sys.argv[1])) as lock:
    if sys.argv[2:] == ["orphan"]:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"], pass_fds=[lock])
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path, *options: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), *options], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_is_refused_and_told_who_is_first(tmp_path):
    process = holder(tmp_path)
    try:
        with pytest.raises(UserError) as error, output_lock.hold(tmp_path, patience=AT_ONCE):
            pass
        assert error.value.exit_code == 2
        assert f"process {process.pid} on {socket.gethostname()} since 2" in str(error.value)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_killed_holder_holds_nothing(tmp_path):
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with output_lock.hold(tmp_path, patience=AT_ONCE):
        assert f" {os.getpid()} " in (tmp_path / ".lock").read_text()


def test_what_a_killed_run_left_running_is_waited_for(tmp_path, capfd):
    process = holder(tmp_path, "orphan")
    began = time.monotonic()
    process.kill()
    process.wait()
    process.stdout.close()
    with output_lock.hold(tmp_path, patience=(30.0, 30.0)):
        assert time.monotonic() - began > 0.5  # the child sleeps a second
    assert f"waiting for {tmp_path}: process {process.pid}" in capfd.readouterr().err


def test_one_after_the_other_is_no_conflict(tmp_path):
    for _ in range(2):
        with output_lock.hold(tmp_path, patience=AT_ONCE):
            pass
