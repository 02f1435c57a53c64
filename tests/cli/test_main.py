"""The command as a whole: help, version, errors, pipes, Ctrl-C, completion, what it imports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import nemotron_launch
from nemotron_launch.cli import main
from tests.conftest import Nemotron
from tests.step_trees import REPOSITORY


def test_version(nemotron: Nemotron) -> None:
    assert nemotron("--version").stdout == f"nemotron {nemotron_launch.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["-h"],
        ["--help"],
        ["steps", "-h"],
        ["steps", "run", "-h"],
        ["steps", "run", "dpo", "a=1", "-h"],
        ["doctor", "-h"],
    ],
)
def test_help_is_everywhere(nemotron: Nemotron, arguments: list[str]) -> None:
    done = nemotron(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: nemotron")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "-c", "tiny", "steps", "run", "dpo"], "nemotron has no option -d"),
        (["stps"], "nemotron has no command stps\n       did you mean nemotron steps?"),
        (["steps", "rn"], "nemotron steps has no command rn\n       did you mean nemotron steps run?"),
        (["steps", "list", "--jsn"], "nemotron steps list has no option --jsn\n       did you mean --json?"),
        (["steps", "list", "--tag"], "option --tag requires an argument"),
        (["completion", "csh"], "invalid value for {bash|zsh|fish}"),
    ],
)
def test_wrong_usage_is_one_message_and_code_2(nemotron: Nemotron, arguments: list[str], message: str) -> None:
    done = nemotron(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")


def test_no_command_shows_the_help(nemotron: Nemotron) -> None:
    done = nemotron()
    assert done.returncode == 2
    assert "Usage: nemotron" in done.stderr


def test_a_defect_of_ours_is_one_line_unless_asked_for_more(tree: Path, nemotron: Nemotron) -> None:
    # The nearest thing to a defect that can be had from outside: a schema of ours that is no schema.
    (tree / "artifacts.yaml").write_text("artifacts: {a: {description: 1, zzz: 2}}")
    (tree / "schemas" / "artifacts.json").write_text('{"type": 7}')
    done = nemotron("steps", "list")
    assert done.returncode == 1
    assert done.stderr.startswith("error: internal: ")
    assert done.stderr.endswith("NEMOTRON_DEBUG=1 shows where\n")
    assert "Traceback" not in done.stderr
    assert "Traceback" in nemotron("steps", "list", NEMOTRON_DEBUG="1").stderr


def test_a_reader_that_leaves_early_is_no_error() -> None:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    script = f"{sys.executable} -m nemotron_launch steps show dpo | head -1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env)
    assert done.stderr == ""
    closed = f"{sys.executable} -m nemotron_launch steps show dpo --json | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", closed], capture_output=True, text=True, env=env)
    assert done.stderr == ""
    assert done.stdout in ("0\n", "141\n"), "as of every command whose reader is gone: 128 + SIGPIPE"


def test_ctrl_c_before_anything_runs_is_130_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("nemotron_launch.cli.steps.load_steps", interrupt)
    assert main.run(["steps", "list"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def completions(words: str, tree: Path) -> list[str]:
    count = len(words.split()) - (0 if words.endswith(" ") else 1)
    env = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "_NEMOTRON_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(count),
    }
    done = subprocess.run(
        [sys.executable, "-c", "from nemotron_launch.cli.main import main; main()"],
        capture_output=True,
        text=True,
        env=env,
    )
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("nemotron st", ["steps"]),
        ("nemotron steps run ", ["rl/pairs", "sft/small"]),
        ("nemotron steps run sft", ["sft/small"]),
        ("nemotron steps show rl", ["rl/pairs"]),
        ("nemotron steps run pairs -c ", ["default", "tiny"]),
        ("nemotron steps run pairs --config t", ["tiny"]),
        ("nemotron steps list --tag ", ["rl", "small"]),
        ("nemotron steps list --consumes synth", ["synthetic_jsonl"]),
    ],
)
def test_the_shell_completes_commands_ids_and_configs(tree: Path, words: str, expected: list[str]) -> None:
    assert completions(words, tree) == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_is_printed(nemotron: Nemotron, shell: str) -> None:
    done = nemotron("completion", shell)
    assert done.returncode == 0
    assert "_NEMOTRON_COMPLETE" in done.stdout


HEAVY = ("torch", "transformers", "datasets", "megatron", "numpy", "pydantic")


@pytest.mark.parametrize(
    ("arguments", "more"),
    [
        ([], ("yaml", "rich", "json")),
        (["--help"], ("yaml", "rich")),
        (["steps", "list"], ("rich", "jsonschema", "omegaconf")),
        (["steps", "show", "dpo"], ("rich", "jsonschema", "omegaconf")),
        (
            ["steps", "run", "dpo", "-c", "tiny", "-d"],
            (
                "rich",
                "jsonschema",
                "omegaconf",
                "jinja2",
                "urllib.request",
                "sqlite3",
                "paramiko",
                "httpx",
                "nemotron_launch.artifacts.record",
            ),
        ),
        (["steps", "run", "rl_prep", "-c", "tiny", "-d"], ("rich", "numpy", "sqlite3", "nemotron_launch.data_prep")),
        (
            ["steps", "run", "dpo", "-b", "slurm", "-d", "--sweep", "dpo.seed=1,2"],
            (
                "rich",
                "jsonschema",
                "omegaconf",
                "sqlite3",
                "paramiko",
                "httpx",
                "nemotron_launch.hosts",
                "nemotron_launch.artifacts.record",
            ),
        ),
        (
            ["pipeline", "run", "align-tiny", "-b", "slurm", "-d"],
            (
                "rich",
                "jsonschema",
                "omegaconf",
                "sqlite3",
                "paramiko",
                "httpx",
                "nemotron_launch.hosts",
            ),
        ),
        (["jobs", "list"], ("rich", "yaml", "jinja2", "paramiko", "httpx", "nemotron_launch.catalog")),
        (["steps", "graph"], ("rich", "jinja2", "sqlite3", "nemotron_launch.hosts")),
        (["artifacts", "list"], ("rich", "jinja2", "paramiko", "httpx")),
    ],
)
def test_a_light_command_imports_nothing_heavy(arguments: list[str], more: tuple[str, ...]) -> None:
    code = (
        "import sys, io, contextlib\n"
        "from nemotron_launch.cli.main import run\n"
        "sink = io.StringIO()\n"
        f"with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink): run({arguments!r})\n"
        "print(*sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-S", "-c", _SITE + code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) & {*HEAVY, *PAGES, *more} <= ({"json"} if arguments else set())


# What only `ui`, `jobs watch` and `jobs report` need.
PAGES = ("http.server", "nemotron_launch.ui", "nemotron_launch.reports")
# Without site's own start-up, whose .pth files may import what they like.
_SITE = f"import sys; sys.path += {[path for path in sys.path if path]!r}\n"


def test_no_module_of_the_launcher_imports_the_trainer_s_libraries() -> None:
    package = REPOSITORY / "nemotron_launch"
    inside = {"trainer", "data_prep"}  # what runs in jobs
    files = [path for path in package.rglob("*.py") if inside.isdisjoint(path.relative_to(package).parts)]
    names = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in files]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    code = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\nprint(*sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-S", "-c", _SITE + code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) & set(HEAVY) == set()
