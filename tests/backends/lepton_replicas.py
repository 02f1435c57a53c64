"""Runs a job spec as Lepton would: each replica the spec's command, with the spec's and Lepton's variables.

All replicas share a network of their own, in which only loopback is up and their names mean it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PREFIX, SUBDOMAIN = "worker", "job.svc"


@dataclass
class Replica:
    """One running replica. output: the file that its container log goes to."""

    index: int
    process: subprocess.Popen[bytes]
    output: Path

    def wait(self, seconds: float = 60) -> int:
        return self.process.wait(seconds)

    def kill(self, signo: int) -> None:
        """As Kubernetes does it: to the container's first process only."""
        self.process.send_signal(signo)

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    @property
    def last_line(self) -> str:
        return self.text.splitlines()[-1]

    def wait_for(self, pattern: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            assert time.monotonic() < end and self.process.poll() is None, self.text
            time.sleep(0.05)


@contextmanager
def replicas(
    spec_text: str,
    folder: Path,
    *,
    secrets: Mapping[str, str] | None = None,
    image_env: Mapping[str, str] | None = None,
    attempt: int = 0,
    names: bool = True,
    rewrites: bool = True,
    only: int | None = None,
) -> Iterator[list[Replica]]:
    """The replicas of a spec, running. What is left of them is killed at the end.

    names: whether the replicas' names resolve. rewrites: whether `$(NAME)` and `$$` are rewritten as Kubernetes does.
    only: start this one alone.
    """
    spec = json.loads(spec_text)["spec"]
    folder.mkdir(parents=True, exist_ok=True)
    count = spec["completions"]
    hosts = folder / "hosts"
    known = "".join(f"127.0.0.1 {PREFIX}-{n}.{SUBDOMAIN}\n" for n in range(count)) if names else ""
    hosts.write_text("127.0.0.1 localhost\n" + known)
    with _network(hosts) as enter:
        started: list[Replica] = []
        try:
            for index in range(count) if only is None else [only]:
                lepton = {
                    "LEPTON_JOB_NAME": "job",
                    "LEPTON_JOB_WORKER_INDEX": str(index),
                    "LEPTON_JOB_TOTAL_WORKERS": str(count),
                    "LEPTON_JOB_WORKER_PREFIX": PREFIX,
                    "LEPTON_SUBDOMAIN": SUBDOMAIN,
                    "LEPTON_WORKER_ID": f"{PREFIX}-{index}",
                    "LEPTON_JOB_FAILURE_COUNT": str(attempt),
                }
                command, env = _as_started(spec, lepton, secrets or {}, rewrites)
                output = folder / f"replica-{index}-{attempt}.log"
                with output.open("wb") as log:
                    process = subprocess.Popen(
                        [*enter, *command],
                        env={"PATH": os.environ["PATH"], "HOME": str(folder), **(image_env or {}), **env},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                started.append(Replica(index, process, output))
            yield started
        finally:
            for replica in started:
                _end(replica.process)


def _as_started(
    spec: Mapping[str, Any], lepton: Mapping[str, str], secrets: Mapping[str, str], rewrites: bool
) -> tuple[list[str], dict[str, str]]:
    env = dict(lepton)
    for entry in spec["envs"]:
        if "value_from" in entry:
            env[entry["name"]] = secrets[entry["value_from"]["secret_name_ref"]]
        else:
            env[entry["name"]] = _rewritten(entry["value"], env) if rewrites else entry["value"]
    command = spec["container"]["command"]
    return [_rewritten(word, env) if rewrites else word for word in command], env


def _rewritten(text: str, env: Mapping[str, str]) -> str:
    """Kubernetes' own rule for env and command: `$(NAME)` of a known variable is its value, `$$` is `$`."""

    def one(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        return env.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", one, text)


@contextmanager
def _network(hosts: Path) -> Iterator[list[str]]:
    """A network namespace whose /etc/hosts is `hosts`: the words that start a command in it."""
    own = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    script = 'ip link set lo up && mount --bind "$1" /etc/hosts && echo up && exec sleep infinity'
    holder = subprocess.Popen(
        ["unshare", *own, "--net", "--mount", "bash", "-c", script, "hold", str(hosts)],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert holder.stdout is not None
        if holder.stdout.readline() != b"up\n":
            assert "CI" not in os.environ, "network and mount namespaces are needed"
            pytest.skip("needs network and mount namespaces: unshare is not allowed here")
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        yield ["nsenter", f"--target={holder.pid}", *user, "--net", "--mount", "--"]
    finally:
        _end(holder)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it left behind in its session's group and below."""
    if process.poll() is None:
        with_children = [process.pid, *_below(process.pid)]
        for pid in with_children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _below(pid: int) -> list[int]:
    try:
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [below for child in children for below in (child, *_below(child))]
