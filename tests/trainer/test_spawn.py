"""spawn: what reaches the processes, what comes back from them, and that none survives."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.spawn import parse

WAIT = 30.0  # seconds for what takes less than one on an idle machine


class Spawn:
    """Starts spawn on a script and shows what it and its processes do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        self.running: list[subprocess.Popen[str]] = []

    def start(self, body: str, *options: object, **popen: object) -> subprocess.Popen[str]:
        script = self.folder / "train.py"
        helpers = f"""
            import json, os, signal, sys, time
            from pathlib import Path
            RANK = int(os.environ["RANK"])
            HERE = Path({str(self.folder)!r})
            def mark(name, text=""):
                (HERE / f"tmp-{{name}}-{{RANK}}").write_text(str(text))
                (HERE / f"tmp-{{name}}-{{RANK}}").rename(HERE / f"{{name}}-{{RANK}}")
        """
        script.write_text(textwrap.dedent(helpers) + textwrap.dedent(body))
        command = [sys.executable, "-m", "nemotron_launch.trainer.spawn", *map(str, options), "--", str(script)]
        defaults = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, **{**defaults, **popen})  # type: ignore[call-overload]
        self.running.append(process)
        return process

    def run(self, body: str, *options: object) -> subprocess.CompletedProcess[str]:
        process = self.start(body, *options)
        stdout, stderr = process.communicate(timeout=WAIT)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def marks(self, name: str, procs: int) -> list[str]:
        """What each rank wrote as its mark, as soon as all have."""
        paths = [self.folder / f"{name}-{rank}" for rank in range(procs)]
        eventually(lambda: all(path.exists() for path in paths))
        return [path.read_text() for path in paths]


def eventually(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Spawn]:
    spawn = Spawn(tmp_path)
    yield spawn
    for process in spawn.running:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()


# What the processes find.

SHOW = 'mark("env", json.dumps(dict(os.environ)))'
NAMES = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR"]


def test_each_process_finds_its_place(spawn):
    assert spawn.run(SHOW, "--procs", 2).returncode == 0
    found = [json.loads(text) for text in spawn.marks("env", 2)]
    assert [[env[name] for name in NAMES] for env in found] == [
        ["0", "0", "2", "2", "0", "127.0.0.1"],
        ["1", "1", "2", "2", "0", "127.0.0.1"],
    ]
    assert found[0]["MASTER_PORT"] == found[1]["MASTER_PORT"]


def test_the_ranks_of_a_second_node_follow_those_of_the_first(spawn):
    options = ["--procs", 2, "--num-nodes", 2, "--node-rank", 1, "--master-addr", "first", "--master-port", 4321]
    assert spawn.run("if RANK == 3: mark('env', json.dumps(dict(os.environ)))", *options).returncode == 0
    env = json.loads((spawn.folder / "env-3").read_text())
    assert [env[name] for name in NAMES] == ["3", "1", "4", "2", "1", "first"]
    assert env["MASTER_PORT"] == "4321"


def test_threads_share_the_cores_unless_the_user_says_otherwise(spawn, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    spawn.run(SHOW, "--procs", 2)
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {json.loads(text)["OMP_NUM_THREADS"] for text in spawn.marks("env", 2)} <= {"1", str(share)}
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    spawn.run(SHOW, "--procs", 2)
    assert {json.loads(text)["OMP_NUM_THREADS"] for text in spawn.marks("env", 2)} == {"7"}


def test_arguments_pass_through_untouched(spawn):
    script = spawn.folder / "show.py"
    script.write_text("import sys; print(sys.argv[1:])")
    command = [sys.executable, "-m", "nemotron_launch.trainer.spawn", "--procs", "1", "--", script]
    done = subprocess.run([*command, "--config", "a b", "--", "--procs"], capture_output=True, text=True, check=True)
    assert done.stdout == "['--config', 'a b', '--', '--procs']\n"


def test_nobody_can_take_the_port_before_rank_0_listens(spawn):
    process = spawn.start(
        """
        mark("port", os.environ["MASTER_PORT"])
        while not (HERE / "go").exists(): time.sleep(0.02)
        import socket
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
            server.bind(("", int(os.environ["MASTER_PORT"])))
            server.listen()
        """,
        *("--procs", 1),
    )
    port = int(spawn.marks("port", 1)[0])
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    (spawn.folder / "go").touch()
    assert process.wait(WAIT) == 0


@pytest.mark.parametrize("libuv", ["0", "1"])
def test_torch_meets_at_the_port(spawn, monkeypatch, libuv):
    pytest.importorskip("torch")
    monkeypatch.setenv("USE_LIBUV", libuv)
    body = """
        import torch
        from torch import distributed
        distributed.init_process_group("gloo")
        total = torch.ones(1)
        distributed.all_reduce(total)
        mark("total", int(total))
        distributed.destroy_process_group()
    """
    assert spawn.run(body, "--procs", 2).returncode == 0
    assert spawn.marks("total", 2) == ["2", "2"]


def test_spawn_itself_imports_nothing_heavy():
    code = "import sys, nemotron_launch.trainer.spawn; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "rich", "omegaconf", "transformers"} & set(modules)


# Exit codes.


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ((0, 0), 0),
        ((85, 85), 85),
        ((0, 85), 85),
        ((2, 2), 2),
        ((7, 85), 7),
    ],
)
def test_exit_codes_come_through(spawn, codes, expected):
    done = spawn.run(f"sys.exit({codes}[RANK])", "--procs", 2, "--output-dir", spawn.out)
    assert done.returncode == expected
    assert (spawn.out / "exit_code").read_text() == f"{expected}\n"


def test_a_signal_becomes_128_plus_its_number(spawn):
    done = spawn.run("os.kill(os.getpid(), signal.SIGKILL)", "--procs", 1, "--output-dir", spawn.out)
    assert done.returncode == 137
    assert (spawn.out / "exit_code").read_text() == "137\n"
    assert (
        done.stderr
        == "error: rank 0 ended first, with signal SIGKILL (also what the kernel sends when memory runs out)\n"
    )


def test_the_first_that_fails_is_named_with_the_end_of_its_log(spawn):
    body = """
        if RANK == 1:
            print("in its log")
            raise SystemExit("what went wrong")
        time.sleep(60)
    """
    done = spawn.run(body, "--procs", 2, "--output-dir", spawn.out, "--grace-seconds", 0.2)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: rank 1 ended first, with exit code 1; the end of {spawn.out}/logs/rank_1.log:",
        "       in its log",
        "       what went wrong",
    ]


def test_the_shown_end_is_of_this_attempt_only(spawn):
    body = 'print(f"attempt {time.time()}") if RANK else None; sys.exit(3 if RANK else 0)'
    for _ in range(2):
        done = spawn.run(body, "--procs", 2, "--output-dir", spawn.out)
        assert done.stderr.count("attempt") == 1
    assert (spawn.out / "logs" / "rank_1.log").read_text().count("attempt") == 2


def test_bad_input_that_rank_0_reports_is_reported_once(spawn):
    body = """
        if RANK == 0:
            time.sleep(0.3)
            print("error: data.train: no such file", file=sys.stderr)
        sys.exit(2)
    """
    done = spawn.run(body, "--procs", 2, "--output-dir", spawn.out)
    assert (done.returncode, done.stderr) == (2, "error: data.train: no such file\n")


def test_others_get_time_to_end_before_they_are_told_to(spawn):
    body = """
        if RANK == 1: sys.exit(5)
        time.sleep(0.5)
        mark("ended")
        sys.exit(1)
    """
    assert spawn.run(body, "--procs", 2).returncode == 5
    assert (spawn.folder / "ended-0").exists()


def test_a_process_that_ignores_the_others_failure_is_killed(spawn):
    body = """
        if RANK == 1: sys.exit(5)
        signal.signal(signal.SIGTERM, lambda *_: mark("told"))
        while True: time.sleep(1)
    """
    assert spawn.run(body, "--procs", 2, "--grace-seconds", 0.5).returncode == 5
    assert (spawn.folder / "told-0").exists()


def test_an_exit_code_of_a_former_attempt_does_not_stay(spawn):
    spawn.out.mkdir()
    (spawn.out / "exit_code").write_text("0\n")
    process = spawn.start("mark('up'); time.sleep(60)", "--procs", 1, "--output-dir", spawn.out)
    spawn.marks("up", 1)
    assert not (spawn.out / "exit_code").exists()
    process.kill()


def test_only_the_first_node_writes_the_exit_code(spawn):
    place = ["--num-nodes", 2, "--node-rank", 1, "--master-addr", "first"]
    assert spawn.run("pass", "--procs", 1, "--output-dir", spawn.out, *place).returncode == 0
    assert not (spawn.out / "exit_code").exists()


# Signals.

LISTEN = """
    got = []
    for signo in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(signo, lambda signo, _: got.append(signo))
    mark("up", os.getpid())
    while not got: time.sleep(0.01)
    time.sleep(0.3)
    mark("got", *got)
    sys.exit(85)
"""


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_reaches_every_process_once(spawn, signo):
    process = spawn.start(LISTEN, "--procs", 2)
    spawn.marks("up", 2)
    process.send_signal(signo)
    assert process.wait(WAIT) == 85
    assert spawn.marks("got", 2) == [str(int(signo))] * 2


def test_a_hang_up_of_the_terminal_counts_as_term(spawn):
    process = spawn.start(LISTEN, "--procs", 1)
    spawn.marks("up", 1)
    process.send_signal(signal.SIGHUP)
    assert process.wait(WAIT) == 85
    assert spawn.marks("got", 1) == [str(int(signal.SIGTERM))]


def test_an_interrupt_of_the_terminal_reaches_every_process_once(spawn):
    controller, terminal = pty.openpty()
    process = spawn.start(
        LISTEN, "--procs", 2, "--output-dir", spawn.out,
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # makes it the controlling terminal
    )  # fmt: skip
    os.close(terminal)
    spawn.marks("up", 2)
    os.write(controller, b"\x03")
    assert process.wait(WAIT) == 85
    assert spawn.marks("got", 2) == [str(int(signal.SIGINT))] * 2
    os.close(controller)


def test_what_a_process_started_for_its_save_is_left_alone(spawn):
    body = """
        import subprocess
        writer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"])
        got = []
        signal.signal(signal.SIGTERM, lambda *_: got.append(1))
        mark("up")
        while not got: time.sleep(0.01)
        sys.exit(85 if writer.wait() == 0 else 1)
    """
    process = spawn.start(body, "--procs", 1)
    spawn.marks("up", 1)
    process.terminate()
    assert process.wait(WAIT) == 85


def test_after_shutdown_seconds_it_kills(spawn):
    body = """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        mark("up")
        time.sleep(60)
    """
    process = spawn.start(body, "--procs", 2, "--shutdown-seconds", 0.3)
    spawn.marks("up", 2)
    process.terminate()
    assert process.wait(WAIT) == 137
    assert "ranks 0, 1: still running 0.3 s after the signal to stop, so killed" in process.stderr.read()


def test_usr1_sets_no_time_limit(spawn):
    body = """
        got = []
        signal.signal(signal.SIGUSR1, lambda *_: got.append(1))
        mark("up")
        while not got: time.sleep(0.01)
        time.sleep(1)
        sys.exit(85)
    """
    process = spawn.start(body, "--procs", 1, "--shutdown-seconds", 0.2)
    spawn.marks("up", 1)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(WAIT) == 85


def test_a_second_interrupt_kills_at_once(spawn):
    body = """
        signal.signal(signal.SIGINT, lambda *_: mark("first"))
        mark("up")
        while True: time.sleep(1)
    """
    process = spawn.start(body, "--procs", 2)
    spawn.marks("up", 2)
    process.send_signal(signal.SIGINT)
    spawn.marks("first", 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(WAIT) == 130


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_before_the_trainer_listens_says_resume_me(spawn, signo):
    # torch takes seconds to import; nothing is lost by then, so the run is to be started again.
    process = spawn.start("mark('up'); time.sleep(60)", "--procs", 2)
    spawn.marks("up", 2)
    process.send_signal(signo)
    assert process.wait(WAIT) == 85
    assert process.stderr.read() == ""


def test_usr2_does_no_harm_before_the_trainer_listens(spawn):
    process = spawn.start("mark('up')\nwhile not (HERE / 'go').exists(): time.sleep(0.02)", "--procs", 1)
    spawn.marks("up", 1)
    process.send_signal(signal.SIGUSR2)
    time.sleep(0.2)
    (spawn.folder / "go").touch()
    assert process.wait(WAIT) == 0


def test_no_process_outlives_a_spawn_that_is_killed(spawn):
    body = """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        mark("up", os.getpid())
        time.sleep(60)
    """
    process = spawn.start(body, "--procs", 2)
    pids = [int(pid) for pid in spawn.marks("up", 2)]
    assert all(is_alive(pid) for pid in pids)
    process.kill()
    eventually(lambda: not any(is_alive(pid) for pid in pids))


def test_what_a_killed_process_had_started_ends_too(spawn):
    body = """
        import subprocess
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        mark("worker", worker.pid)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert spawn.run(body, "--procs", 1, "--output-dir", spawn.out).returncode == 137
    eventually(lambda: not is_alive(int((spawn.folder / "worker-0").read_text())))


# Output.


def test_rank_0_has_the_terminal_and_the_others_their_logs(spawn):
    controller, terminal = pty.openpty()
    body = 'print(f"rank {RANK} tty {sys.stderr.isatty()}", file=sys.stderr)'
    process = spawn.start(body, "--procs", 2, "--output-dir", spawn.out, stdout=terminal, stderr=terminal)
    os.close(terminal)
    assert process.wait(WAIT) == 0
    assert os.read(controller, 1000).decode().split("\r\n")[:-1] == ["rank 0 tty True"]
    assert (spawn.out / "logs" / "rank_1.log").read_text() == "rank 1 tty False\n"
    os.close(controller)


def test_without_an_output_folder_lines_carry_their_rank(spawn):
    done = spawn.run('print(f"from {RANK}"); print("and more", file=sys.stderr)', "--procs", 2)
    assert done.stdout == "from 0\n"
    assert sorted(done.stderr.splitlines()) == ["[rank 1] and more", "[rank 1] from 1", "and more"]


# The command line.


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "train.py").touch()
    return str(tmp_path / "train.py")


def test_the_place_comes_from_options_then_the_standard_variables_then_srun(script):
    standard = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "4321"}
    srun = {"SLURM_STEP_NUM_NODES": "4", "SLURM_NODEID": "3", "MASTER_ADDR": "other"}

    def place(options: list[str], environ: dict[str, str]) -> tuple[object, ...]:
        launch = parse(["--procs", "1", *options, "--", script], environ)
        return launch.num_nodes, launch.node_rank, launch.master_addr, launch.master_port

    assert place([], standard) == (2, 1, "first", 4321)
    assert place([], {**srun, **standard}) == (2, 1, "first", 4321)
    assert place([], srun) == (4, 3, "other", 29500)
    assert place(["--num-nodes", "3", "--node-rank", "2", "--master-port", "9"], standard) == (3, 2, "first", 9)
    # One node: another program's variables do not matter, nor does an allocation in which no srun started us.
    assert place([], {"MASTER_ADDR": "x", "MASTER_PORT": "1", "SLURM_NNODES": "8"}) == (1, 0, None, None)
    assert place(["--num-nodes", "1"], standard) == (1, 0, None, None)


@pytest.mark.parametrize(
    ("argv", "environ", "said"),
    [
        (["--procs", "1"], {}, "nothing to start"),
        (["--procs", "1", "--", "no/train.py"], {}, "no/train.py: no such script"),
        (["--procs", "0", "--", "SCRIPT"], {}, "at least one process"),
        (["--procs", "1", "--num-nodes", "2", "--", "SCRIPT"], {}, "not where rank 0 listens"),
        (["--procs", "1", "--num-nodes", "2", "--node-rank", "2", "--", "SCRIPT"], {"MASTER_ADDR": "a"}, "node 2 of 2"),
        (["--procs", "1", "--", "SCRIPT"], {"NNODES": "two"}, "environment variable NNODES: 'two' is not a number"),
    ],
)
def test_a_wrong_command_line_is_one_message(script, argv, environ, said):
    with pytest.raises(UserError) as error:
        parse([script if part == "SCRIPT" else part for part in argv], environ)
    assert re.search(re.escape(said), str(error.value))
    assert error.value.exit_code == 2
