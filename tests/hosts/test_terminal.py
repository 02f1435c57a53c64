"""A terminal on a host: its size, its keys, its exit code; and what is asked on ours."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.hosts.conftest import WAYS
from tests.hosts.terminal import REPOSITORY, in_terminal
from tests.sshd import Sshd

OPEN = "import json, os, sys; from nemotron_launch.hosts import open_host; host = open_host(json.loads({!r}))\n"


@pytest.fixture(params=list(WAYS))
def tunnel(request: pytest.FixtureRequest, sshd: Sshd) -> dict[str, Any]:
    way = WAYS[request.param]
    return {**sshd.tunnel, **way} if way else {}


def program(tunnel: dict[str, Any], script: str) -> str:
    opened = OPEN.format(json.dumps(tunnel))
    return f"{opened}code = host.interactive({script!r}); host.close(); sys.exit(code)"


def test_a_terminal_there_is_one_and_has_the_size_of_ours(sshd: Sshd, tunnel: dict[str, Any]) -> None:
    script = (
        'stty size; tty -s && echo $TERM; [ -z "$HF_TOKEN" ] && read -p \'name? \' name; echo "it is $name"; exit 5'
    )
    code, shown = in_terminal(
        program(tunnel, script), [("name? ", "x 'y'\r")], env={**sshd.environment, "HF_TOKEN": ""}, size=(31, 77)
    )
    assert code == 5, shown
    assert "31 77" in shown
    assert "xterm" in shown
    assert "it is x 'y'" in shown


def test_ctrl_c_is_for_the_program_there(sshd: Sshd, tunnel: dict[str, Any]) -> None:
    script = "trap 'echo caught; exit 9' INT; echo ready; while :; do sleep 0.1; done"
    code, shown = in_terminal(program(tunnel, script), [("ready", "\x03")], env=sshd.environment)
    assert (code, "caught" in shown) == (9, True), shown


def test_without_a_terminal_it_is_a_pipe(sshd: Sshd, tunnel: dict[str, Any]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program(tunnel, "tr a-z A-Z; echo err >&2; exit 4")],
        input=b"words\n", capture_output=True, timeout=60, cwd=REPOSITORY, start_new_session=True,
        env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", **sshd.environment},
    )  # fmt: skip
    assert done.returncode == 4
    assert done.stdout.endswith(b"WORDS\n")  # behind what the profile scripts say
    assert done.stderr.splitlines()[-1] == b"err"


def test_ctrl_c_waits_for_the_answer_and_keeps_the_connection(sshd: Sshd) -> None:
    code = OPEN.format(json.dumps(sshd.tunnel)) + (
        "host.run('true'); ready = 'echo ready >' + os.ttyname(0)\n"
        "try: print('lost', host.run(ready + '; sleep 1; echo done').stdout)\n"
        "except KeyboardInterrupt: print('interrupted', host.run('echo again').stdout)"
    )
    _, shown = in_terminal(code, [("ready", "\x03")], env=sshd.environment)
    assert "interrupted" in shown and "again" in shown, shown
