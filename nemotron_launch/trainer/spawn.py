"""Starts the trainer's processes of one node and watches over them; run as a module, imports no torch, Linux only.

    python -m nemotron_launch.trainer.spawn --procs 2 --output-dir out -- train.py --config out/config.yaml

Each process is a Python that finds RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, NODE_RANK, MASTER_ADDR, MASTER_PORT
and OMP_NUM_THREADS in its environment. Instead of torchrun, because there exit code 85 becomes 1, SIGUSR1 kills the
agent and leaves its workers behind, and a save has 30 s after SIGTERM.

Signals. TERM, USR1 and INT are passed on once each to every process (not to what those started: a helper that writes a
checkpoint must live on); a terminal that hangs up counts as TERM. After TERM or INT they have `--shutdown-seconds`; a
second INT kills at once. USR2 makes them print their stacks. When spawn dies, however it dies, its processes die.

Exit code. 0 when all ended with 0; 85 when all ended with 0 or 85, or when one was stopped before it could listen to
the signal that asked it to; otherwise that of the process that failed first, 128 + n for signal n.
`exit_code` in the output folder holds it (written by node 0; removed at the start, so none means killed). A second
run in the same output folder is refused with 2 while any process of the first lives.

Output. Rank 0 has the terminal; the others write to `logs/rank_N.log` in the output folder, or here, with their rank
in front of each line, when there is none.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nemotron_launch.errors import UserError
from nemotron_launch.trainer import output_lock
from nemotron_launch.trainer.exit_codes import BAD_INPUT, FAILED, FINISHED, RESUME_ME
from nemotron_launch.trainer.file_errors import file_error

PASSED_ON = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP}
KILLED_BY_USER = 128 + signal.SIGINT
TAIL_LINES = 25
_PR_SET_PDEATHSIG = 1
Mask = set[int | signal.Signals]


@dataclass(frozen=True)
class Launch:
    """What to start on this node. `command` is a script and its arguments; seconds are wall-clock."""

    command: tuple[str, ...]
    procs: int
    num_nodes: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int | None = None
    output_dir: Path | None = None
    shutdown_seconds: float = 600.0
    grace_seconds: float = 10.0


@dataclass
class Child:
    """One process. `code` is its exit code, or minus the signal that ended it; None while it runs."""

    rank: int
    process: subprocess.Popen[bytes]
    log: Path | None
    log_start: int
    code: int | None = None


def run(launch: Launch) -> int:
    """Start the processes, watch them to the end, and return the exit code for this node.

    Raises UserError where the output folder cannot be written, or is another run's.
    """
    if launch.output_dir is None:
        return _run(launch, ())
    launch.output_dir.mkdir(parents=True, exist_ok=True)
    if launch.node_rank > 0:
        return _run(launch, ())
    with output_lock.hold(launch.output_dir) as lock:
        (launch.output_dir / "exit_code").unlink(missing_ok=True)
        code = _run(launch, (lock,))
        try:
            write_exit_code(launch.output_dir, code)
        except OSError as error:
            _say(str(file_error(error, launch.output_dir / "exit_code")))
        return code


def _run(launch: Launch, inherited: tuple[int, ...]) -> int:
    """inherited: descriptors that every process keeps open."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Blocked and fetched with sigtimedwait: no handler can run in the middle of anything, and none is lost.
    fetched = {s for s in PASSED_ON if signal.getsignal(s) is not signal.SIG_IGN} | {signal.SIGCHLD}
    mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, fetched)
    children: list[Child] = []
    try:
        with _rendezvous(launch) as (addr, port):
            for local_rank in range(launch.procs):
                children.append(_start(launch, local_rank, addr, port, mask_before, inherited))
            pumps = [_prefix_lines(child) for child in children if child.process.stdout]
            code = _Watch(launch, children).until_all_ended(fetched)
            for pump in pumps:
                pump.join(timeout=2)
    finally:
        for child in children:
            if child.code is None:
                _kill(child)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask_before)
    return code


def write_exit_code(output_dir: Path, code: int) -> None:
    """Put `code` into `<output_dir>/exit_code`, so that a reader sees all of it or no file."""
    temporary = output_dir / f".exit_code.{os.getpid()}"
    temporary.write_text(f"{code}\n")
    temporary.replace(output_dir / "exit_code")


@contextlib.contextmanager
def _rendezvous(launch: Launch) -> Iterator[tuple[str, int]]:
    """Where rank 0 will listen. On one node a free loopback port, ours until the end.

    The socket is bound but does not listen: the kernel then gives this port to nobody who asks for any free one, and
    rank 0, which binds with SO_REUSEADDR as we do, can still listen on it. So nothing can come between.
    """
    if launch.num_nodes > 1 or launch.master_port:
        yield launch.master_addr or "127.0.0.1", launch.master_port or 29500
        return
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield "127.0.0.1", reserved.getsockname()[1]


def _start(launch: Launch, local_rank: int, addr: str, port: int, mask: Mask, inherited: tuple[int, ...]) -> Child:
    rank = launch.node_rank * launch.procs + local_rank
    env = {
        "OMP_NUM_THREADS": str(max(1, usable_cores() // launch.procs)),
        "PYTHONUNBUFFERED": "1",  # so that a killed process leaves its last words in the log
        "PYTHONFAULTHANDLER": "1",
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(launch.num_nodes * launch.procs),
        "LOCAL_WORLD_SIZE": str(launch.procs),
        "NODE_RANK": str(launch.node_rank),
        "MASTER_ADDR": addr,
        "MASTER_PORT": str(port),
    }
    log, log_start = None, 0
    output: IO[bytes] | int | None = None
    if rank > 0 and launch.output_dir:
        log = launch.output_dir / "logs" / f"rank_{rank}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        output = log.open("ab")
        log_start = log.stat().st_size
    elif rank > 0:
        output = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, *launch.command],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        pass_fds=inherited,
        # A group of its own: the terminal's Ctrl-C reaches us only, and we can end what a dead process left behind.
        process_group=0,
        preexec_fn=_in_child(os.getpid(), mask),  # safe: we have a single thread here
    )
    if log:
        output.close()  # type: ignore[union-attr]
    return Child(rank, process, log, log_start)


def _in_child(parent: int, mask: Mask) -> Callable[[], None]:
    libc = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        # The kernel kills the process when its parent dies, also by SIGKILL; the parent may be dead already.
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:
            os._exit(FAILED)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # harmless until the trainer prints its stacks on it
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    return prepare


class _Watch:
    """The processes between start and end: what was asked of them, who failed first, and when patience ends."""

    def __init__(self, launch: Launch, children: list[Child]) -> None:
        self.launch = launch
        self.children = children
        self.asked: set[int] = set()  # the signals we passed on
        self.first: Child | None = None  # the first that failed
        self.cut_short = False  # one was stopped before it listened to signals
        self.code_by_force: int | None = None
        self.term_at: float | None = None
        self.kill_at: float | None = None

    def until_all_ended(self, fetched: set[signal.Signals]) -> int:
        while any(child.code is None for child in self.children):
            moments = [moment for moment in (self.term_at, self.kill_at) if moment is not None]
            wait = max(0.0, min(moments) - time.monotonic()) if moments else 3600.0
            got = signal.sigtimedwait(fetched, wait)
            if got and got.si_signo != signal.SIGCHLD:
                self._pass_on(got.si_signo)
            self._reap(first_pid=got.si_pid if got and got.si_signo == signal.SIGCHLD else 0)
            self._keep_time()
        return self._result()

    def _pass_on(self, signo: int) -> None:
        if signo == signal.SIGINT and signal.SIGINT in self.asked:
            self._force("second interrupt: killing", KILLED_BY_USER)
            return
        if signo == signal.SIGHUP:
            signo = signal.SIGTERM
        if signo != signal.SIGUSR2:
            self.asked.add(signo)
        if signo in (signal.SIGTERM, signal.SIGINT) and self.kill_at is None:
            self.kill_at = time.monotonic() + self.launch.shutdown_seconds
        self._send(signo)

    def _send(self, signo: int) -> None:
        for child in self.children:
            if child.code is None:
                child.process.send_signal(signo)

    def _reap(self, first_pid: int) -> None:
        # SIGCHLD tells who died first; later deaths may hide behind it.
        for child in sorted(self.children, key=lambda child: child.process.pid != first_pid):
            if child.code is None and _has_ended(child):
                self._note_end(child)

    def _note_end(self, child: Child) -> None:
        assert child.code is not None
        if child.code in (FINISHED, RESUME_ME) or self.first or self.cut_short or self.code_by_force is not None:
            return
        now = time.monotonic()
        if -child.code in self.asked - {signal.SIGINT}:
            self.cut_short = True
        else:
            self.first = child
            said_itself = child.rank == 0 and child.code == FAILED  # it has the terminal
            if child.code != BAD_INPUT and -child.code not in self.asked and not said_itself:
                _say_failed(child)
        self.term_at = now + self.launch.grace_seconds
        self.kill_at = now + 2 * self.launch.grace_seconds

    def _keep_time(self) -> None:
        now = time.monotonic()
        if self.term_at is not None and now >= self.term_at:
            self.term_at = None
            self._send(signal.SIGTERM)
        if self.kill_at is not None and now >= self.kill_at:
            if self.first or self.cut_short:
                for child in self.children:
                    if child.code is None:
                        _kill(child)
            else:
                waited = f"{self.launch.shutdown_seconds:g} s after the signal to stop"
                self._force(f"still running {waited}, so killed", 128 + signal.SIGKILL)
            self.kill_at = None

    def _force(self, why: str, code: int) -> None:
        still = [child for child in self.children if child.code is None]
        if still:
            self.code_by_force = code
            _say(f"error: {_ranks(still)}: {why}")
            for child in still:
                _kill(child)

    def _result(self) -> int:
        if self.code_by_force is not None:
            return self.code_by_force
        if self.first:
            assert self.first.code is not None
            # Rank 0 says what is wrong with the input; nothing to add when it did.
            if self.first.code == BAD_INPUT and self.children[0].code != BAD_INPUT:
                _say_failed(self.first)
            return self.first.code if self.first.code > 0 else 128 - self.first.code
        resume = self.cut_short or any(child.code == RESUME_ME for child in self.children)
        return RESUME_ME if resume else FINISHED


def _has_ended(child: Child) -> bool:
    """Fetch the end of `child`, if it has ended; what it left running after a failure is told to end too."""
    pid = child.process.pid
    end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if end is None:
        return False
    failed = end.si_code != os.CLD_EXITED or end.si_status not in (FINISHED, RESUME_ME)
    if failed:
        # Not yet reaped, so the group's number is still its own.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGTERM)
    child.code = child.process.wait()
    return True


def _kill(child: Child) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.process.pid, signal.SIGKILL)
    child.code = child.process.wait()


def _say_failed(child: Child) -> None:
    assert child.code is not None
    if child.code > 0:
        how = f"exit code {child.code}"
    else:
        how = f"signal {signal.Signals(-child.code).name}"
        how += " (also what the kernel sends when memory runs out)" if -child.code == signal.SIGKILL else ""
    _say(f"error: rank {child.rank} ended first, with {how}" + (f"; the end of {child.log}:" if child.log else ""))
    if child.log:
        for line in _tail(child.log, child.log_start):
            _say(f"       {line}")


def _tail(log: Path, start: int) -> list[str]:
    """The last lines that this attempt wrote into `log`."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - 16_384))
        return file.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
    return []


def _ranks(children: Sequence[Child]) -> str:
    return f"rank{'s' if len(children) > 1 else ''} {', '.join(str(child.rank) for child in children)}"


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _prefix_lines(child: Child) -> threading.Thread:
    """Pass the child's output on to our stderr, each line with its rank in front."""

    def pump() -> None:
        assert child.process.stdout is not None
        for line in child.process.stdout:
            _say(f"[rank {child.rank}] {line.decode(errors='replace').rstrip()}")

    thread = threading.Thread(target=pump, daemon=True)
    thread.start()
    return thread


def usable_cores() -> int:
    """The cores that this process may use: its affinity, and the quota of its control group (version 2)."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Launch:
    """The launch that a command line and the environment describe.

    Options that are not given come from NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT, the first two else from srun
    (SLURM_STEP_NUM_NODES and SLURM_NODEID: an allocation of many nodes in which no srun started us is one node to us).
    On one node the environment's address and port are not used: they are another program's.
    """
    split = argv.index("--") if "--" in argv else len(argv)
    options, command = list(argv[:split]), tuple(argv[split + 1 :])
    parser = argparse.ArgumentParser(
        prog="python -m nemotron_launch.trainer.spawn",
        usage="%(prog)s --procs N [options] -- script [arguments]",
        description="Start the trainer's processes of one node.",
        allow_abbrev=False,
    )
    parser.add_argument("--procs", type=int, required=True, help="processes on this node")
    parser.add_argument("--num-nodes", type=int, help="nodes in all (default: NNODES, srun's, or 1)")
    parser.add_argument("--node-rank", type=int, help="this node, from 0 (default: NODE_RANK, srun's, or 0)")
    parser.add_argument("--master-addr", help="where rank 0 listens (default: MASTER_ADDR; this machine if one node)")
    parser.add_argument("--master-port", type=int, help="its port (default: MASTER_PORT, 29500; one node: free)")
    parser.add_argument("--output-dir", type=Path, help="folder for exit_code and logs/rank_N.log")
    parser.add_argument("--shutdown-seconds", type=float, default=600.0, help="from TERM to KILL (default 600)")
    parser.add_argument("--grace-seconds", type=float, default=10.0, help="from a failure to TERM to KILL (default 10)")
    given = parser.parse_args(options)
    if not command:
        raise UserError("nothing to start", where="spawn", hint="give the script after --: --procs 2 -- train.py")
    if not command[0].startswith("-") and not Path(command[0]).is_file():
        raise UserError("no such script", where=command[0])
    num_nodes = _first(given.num_nodes, environ, "NNODES", "SLURM_STEP_NUM_NODES", default=1)
    node_rank = _first(given.node_rank, environ, "NODE_RANK", "SLURM_NODEID", default=0) if num_nodes > 1 else 0
    if given.procs < 1 or num_nodes < 1:
        raise UserError("at least one process and one node are needed", where="spawn")
    if given.num_nodes == 1 and given.node_rank:
        raise UserError(f"node {given.node_rank} of 1", where="--node-rank", hint="nodes are counted from 0")
    if not 0 <= node_rank < num_nodes:
        raise UserError(f"node {node_rank} of {num_nodes}", where="--node-rank", hint="nodes are counted from 0")
    addr, port = given.master_addr, given.master_port
    if num_nodes > 1:
        addr = addr or environ.get("MASTER_ADDR")
        port = _first(port, environ, "MASTER_PORT", default=29500)
        if not addr:
            hint = "give the first node's name with --master-addr or MASTER_ADDR"
            raise UserError(f"{num_nodes} nodes, but not where rank 0 listens", where="spawn", hint=hint)
    return Launch(
        command, given.procs, num_nodes, node_rank, addr, port,
        given.output_dir, given.shutdown_seconds, given.grace_seconds,
    )  # fmt: skip


def _first(given: int | None, environ: Mapping[str, str], *names: str, default: int) -> int:
    if given is not None:
        return given
    for name in names:
        if environ.get(name):
            try:
                return int(environ[name])
            except ValueError:
                raise UserError(f"{environ[name]!r} is not a number", where=f"environment variable {name}") from None
    return default


def main(argv: Sequence[str] | None = None) -> int:
    try:
        if sys.platform != "linux":
            raise UserError("training processes need Linux", where="spawn", exit_code=FAILED)
        return run(parse(sys.argv[1:] if argv is None else argv, os.environ))
    except UserError as error:
        _say(str(error))
        return error.exit_code
    except OSError as error:
        _say(str(file_error(error)))
        return file_error(error).exit_code
    except KeyboardInterrupt:  # while we wait for the output folder
        return KILLED_BY_USER


if __name__ == "__main__":
    sys.exit(main())
