"""The sandbox: hostile programs do no harm, as root and as anybody; where nothing can be isolated, nothing runs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hostile import ALL, BRIEF, HELD, LIMITS, SECRET, Hostile, attempt, harm

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.environments import jail, sandbox
from nemotron_launch.trainer.environments.code import CodeEnvironment
from nemotron_launch.trainer.environments.sandbox import NoIsolation, Program, python, run_programs

REPOSITORY = Path(__file__).parents[3]
ANYBODY = 12345


@pytest.fixture(scope="module", autouse=True)
def isolation() -> None:
    """Containers of some CI services allow no namespaces; there only the refusal can be tested."""
    try:
        run_programs({}, [Program(["/bin/true"])], LIMITS)
    except NoIsolation as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no isolation here: {error}")


@pytest.mark.parametrize("name", ALL)
def test_hostile_programs_do_no_harm(name, monkeypatch):
    monkeypatch.setenv(SECRET, "secret")
    assert harm(ALL[name], attempt(ALL[name])) == ""
    assert jail.descendants(os.getpid()) == [] or not programs_left()


def programs_left() -> list[str]:
    """Command lines of programs that still run below this process."""
    found = []
    for pid in jail.descendants(os.getpid()):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if "program.py" in line or "jail.py" in line:
            found.append(line)
    return found


# A container's root is often the only user of a user namespace, and cannot become another.
@pytest.mark.slow
@pytest.mark.parametrize("prefix", [[], ["unshare", "--map-root-user"]], ids=["anybody", "a container's root"])
@pytest.mark.skipif(os.geteuid() != 0, reason="the tests above did it as this user")
def test_hostile_programs_do_no_harm_without_root(prefix):
    who = {"user": ANYBODY, "group": ANYBODY, "extra_groups": [], "cwd": "/"}
    for interpreter in (sys.executable, "/usr/bin/python3", shutil.which("python3") or ""):
        try:
            subprocess.run([interpreter, "-c", "import sys; assert sys.version_info >= (3, 11)"], check=True, **who)
            break
        except (OSError, subprocess.CalledProcessError):
            continue
    else:
        pytest.skip("no Python that another user may start")
    done = subprocess.run(
        [*prefix, interpreter, "-B", str(Path(__file__).parent / "hostile.py")],
        env={"PATH": os.defpath, "PYTHONPATH": str(REPOSITORY), "HOME": "/"},
        capture_output=True,
        text=True,
        timeout=300,
        **who,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    user = 0 if prefix else ANYBODY
    assert done.stdout.startswith(f"user {user}: {len(ALL)} programs, 0 did harm, 0 processes left")


def test_programs_see_python_and_nothing_else():
    source = "import os, json, numpy; print(sorted(os.listdir('.')), os.getcwd(), os.path.exists('pyproject.toml'))"
    (end,) = run_programs({"program.py": source, "data.txt": "é"}, [Program(python("program.py"))], LIMITS)
    assert end.stderr == ""
    assert end.stdout == "['data.txt', 'program.py'] /scratch False\n"


def test_programs_read_what_they_are_given_one_after_another():
    programs = [Program(python("program.py"), stdin=text) for text in ("a", "é" * 100_000, "")]
    source = "import sys; text = sys.stdin.read(); print(len(text)); sys.exit(len(text))"
    ends = run_programs({"program.py": source}, programs, LIMITS)
    assert [end.stdout for end in ends] == ["1\n", "100000\n", "0\n"]
    assert [end.code for end in ends] == [1, 100_000 % 256, 0]


def test_a_limit_that_is_passed_ends_those_that_come_after_too():
    source = "import sys\nif sys.stdin.read(): print('first')\nelse:\n    while True: pass"
    programs = [Program(python("program.py"), stdin=text) for text in ("go", "", "go")]
    ends = run_programs({"program.py": source}, programs, BRIEF)
    assert [(end.stdout, end.problem) for end in ends] == [("first\n", ""), ("", "time")]


def test_as_many_processes_as_allowed_may_run():
    source = """
import os, time
started = 0
for _ in range(LIMIT):
    try:
        if os.fork() == 0: time.sleep(60)
        started += 1
    except OSError: pass
print(started)
"""
    several = replace(LIMITS, processes=6)
    (end,) = run_programs({"program.py": source.replace("LIMIT", "20")}, [Program(python("program.py"))], several)
    assert end.stdout == "5\n"  # and the program itself


def test_another_thread_can_stop_programs():
    stop = threading.Event()
    timer = threading.Timer(0.3, stop.set)
    timer.start()
    started = time.monotonic()
    (end,) = run_programs({"program.py": "while True: pass"}, [Program(python("program.py"))], LIMITS, stop=stop)
    timer.join()
    assert end.problem == "stopped"
    assert time.monotonic() - started < LIMITS.seconds / 2


def test_a_trainer_that_is_killed_leaves_no_program_behind(tmp_path):
    script = f"""
import sys; sys.path[:0] = {[str(REPOSITORY), str(Path(__file__).parent)]!r}
from hostile import LIMITS
from nemotron_launch.trainer.environments.sandbox import Program, python, run_programs
print("ready", flush=True)
run_programs({{"program.py": "import time; time.sleep(600)"}}, [Program(python("program.py", sys.argv[1]))], LIMITS)
"""
    trainer = subprocess.Popen([sys.executable, "-c", script, tmp_path.name], stdout=subprocess.PIPE, text=True)
    try:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "ready\n"
        wait_for(lambda: running(tmp_path.name))
    finally:
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
        trainer.stdout.close()
    wait_for(lambda: not running(tmp_path.name))


def running(marker: str) -> list[int]:
    """Processes with a word in their command line, except the test's own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if marker.encode() in words:
            found.append(int(path.parent.name))
    return found


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


SECTION = {
    "num_workers": 2,
    "timeout": 30,
    "memory_mib": 256,
    "max_processes": 8,
    "max_output_kib": 256,
    "allow_unisolated": False,
}


@pytest.fixture
def no_namespaces(monkeypatch, tmp_path):
    """A machine whose kernel refuses namespaces."""
    script = Path(jail.__file__).read_text(encoding="utf-8")
    refusing = tmp_path / "jail.py"
    refusing.write_text(
        script.replace(
            "def make_namespaces() -> None:", "def make_namespaces() -> None:\n    raise Impossible('unshare: no')"
        )
    )
    monkeypatch.setattr(sandbox, "_JAIL", refusing)


def test_where_nothing_can_be_isolated_nothing_runs(no_namespaces):
    environment = CodeEnvironment(SECTION)
    with pytest.raises(UserError) as refused:
        environment.check([{"tests": ["assert True"]}], ["a.jsonl:1"])
    assert "cannot be isolated on this machine (unshare: no)" in str(refused.value)
    assert "env.code.allow_unisolated=true" in str(refused.value)


def test_without_isolation_limits_still_hold_where_the_config_allows_it(no_namespaces):
    environment = CodeEnvironment({**SECTION, "allow_unisolated": True})
    environment.check([{"tests": ["assert True"]}], ["a.jsonl:1"])
    for name in (
        "allocates a lot",
        "fills the disk with a file",
        "daemonises",
        "opens connections",
        "raises its limits",
    ):
        assert harm(HELD[name], attempt(HELD[name], isolated=False)) == ""
    forever = Hostile("while True: pass", problems=("time",), limits=BRIEF)
    assert harm(forever, attempt(forever, isolated=False)) == ""
    unisolated = replace(LIMITS, isolated=False, own_user=False)
    daemon = "import os, time\npid = os.fork()\nif pid == 0:\n    os.setsid(); time.sleep(600)\nprint(pid)"
    (end,) = run_programs({"program.py": daemon}, [Program(python("program.py"))], unisolated)
    wait_for(lambda: not Path(f"/proc/{int(end.stdout)}").exists())
