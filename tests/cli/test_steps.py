"""`nemotron steps`: what people type, in its own process and in a pipe."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import Nemotron
from tests.step_trees import REPOSITORY


def seen(output_dir: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((Path(output_dir) / "seen.json").read_text())
    return found


def test_list_is_plain_text_in_a_pipe(tree: Path, nemotron: Nemotron) -> None:
    done = nemotron("steps", "list")
    assert done.returncode == 0
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["ID", "CATEGORY", "CONSUMES", "PRODUCES", "DESCRIPTION"],
        ["rl/pairs", "rl", "training_jsonl,checkpoint_megatron?", "checkpoint_megatron", "Does", "rl/pairs."],
        ["sft/small", "sft", "training_jsonl,checkpoint_megatron?", "checkpoint_megatron", "Does", "sft/small."],
    ]
    assert "\x1b" not in done.stdout


def test_list_is_a_table_on_a_terminal(tree: Path) -> None:
    shown = in_terminal("steps", "list")
    assert "─" in shown
    assert "rl/pairs" in shown


def test_json_is_sorted_and_the_same_each_time(tree: Path, nemotron: Nemotron) -> None:
    first, second = nemotron("steps", "list", "--json").stdout, nemotron("steps", "list", "--json").stdout
    assert first == second
    steps = json.loads(first)
    assert [step["id"] for step in steps] == ["rl/pairs", "sft/small"]
    assert list(steps[0]) == sorted(steps[0])
    assert steps[0]["consumes"][0] == {
        "description": "Rows.",
        "key": "data.path",
        "required": True,
        "type": "training_jsonl",
    }


def test_filters_that_match_nothing_say_so_and_succeed(tree: Path, nemotron: Nemotron) -> None:
    done = nemotron("steps", "list", "--produces", "binidx")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "no step matches\n")
    assert nemotron("steps", "list", "--produces", "binidx", "--json").stdout == "[]\n"


def test_show_has_everything_that_the_manifest_says(nemotron: Nemotron) -> None:
    done = nemotron("steps", "show", "dpo")
    assert done.returncode == 0
    manifest = yaml.safe_load((REPOSITORY / "steps/rl/nemo_rl/dpo/step.yaml").read_text())

    def texts(value: object) -> list[str]:
        if isinstance(value, dict):
            return [text for item in value.values() for text in texts(item)]
        if isinstance(value, list):
            return [text for item in value for text in texts(item)]
        return value.strip().splitlines() if isinstance(value, str) else []

    launch = manifest["entry"].pop("launch")
    assert launch == "processes"
    assert "one process per GPU" in done.stdout
    for text in texts(manifest):
        assert text in done.stdout
    assert "dpo.reference_policy_kl_penalty = 0.05" in done.stdout
    assert "configs        default, tiny" in done.stdout


def test_show_json_has_the_whole_manifest(nemotron: Nemotron) -> None:
    shown = json.loads(nemotron("steps", "show", "rl/nemo_rl/dpo", "--json").stdout)
    manifest = yaml.safe_load((REPOSITORY / "steps/rl/nemo_rl/dpo/step.yaml").read_text())
    assert set(manifest) - set(shown) == set()
    for key in ("id", "consumes", "produces", "strategies", "errors", "resources", "entry", "image", "reference"):
        assert shown[key] == manifest[key]
    assert shown["configs"] == ["default", "tiny"]


def test_run_hands_the_composed_config_to_the_script(tree: Path, nemotron: Nemotron) -> None:
    done = nemotron("steps", "run", "small", "cluster.procs_per_node=2", "+env_vars.A=b c", "--", "--flag", "x=1")
    assert done.returncode == 0, done.stderr
    found = seen("out/sft")
    assert found["argv"] == ["--flag", "x=1"]
    assert found["config"] == {
        "output_dir": "out/sft",
        "env_vars": {"A": "b c"},
        "cluster": {"num_nodes": 1, "procs_per_node": 2},
        "checkpointing": {"checkpoint_dir": "out/sft/checkpoints", "pretrained": None},
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ["-d", "small", "-c", "tiny", "exit=1"],
        ["small", "-c", "tiny", "exit=1", "-d"],
        ["-c", "tiny", "small", "exit=1", "--dry-run"],
        ["small", "-dc", "tiny", "exit=1"],
        ["--config=tiny", "-d", "sft/small", "exit=1"],
    ],
)
def test_options_may_stand_before_and_after_the_id(tree: Path, nemotron: Nemotron, arguments: list[str]) -> None:
    done = nemotron("steps", "run", *arguments)
    assert done.returncode == 0, done.stderr
    data = yaml.safe_load(done.stdout)
    assert (data["output_dir"], data["exit"]) == ("out/sft-tiny", 1)
    assert list(Path.cwd().iterdir()) == [], "a dry run writes nothing"


def test_dry_run_is_the_config_as_yaml_with_the_command_as_a_comment(tree: Path, nemotron: Nemotron) -> None:
    first, second = (nemotron("steps", "run", "small", "-d", "--", "--flag=a b").stdout for _ in range(2))
    assert first == second
    lines = first.splitlines()
    assert lines[0] == "# sft/small -c default, on this machine"
    assert lines[1].startswith(f"# {sys.executable} {tree}/sft/small/train.py --config .nemotron/runs/small-default-")
    assert lines[1].endswith("/config.yaml '--flag=a b'")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["small", "--dry-rum"], "nemotron steps run has no option --dry-rum\n       did you mean --dry-run?"),
        (["small", "-x"], "nemotron steps run has no option -x\n       its options: nemotron steps run -h"),
        (["smal"], "there is no step smal\n       did you mean sft/small?"),
        (["small", "-c", "tny"], "sft/small has no config tny\n       did you mean tiny?"),
        (["small", "-c", "x/y.yaml"], "x/y.yaml: there is no such config file\n       there is no folder x"),
        (["small", "exitt=1"], "command line: unknown key exitt\n       did you mean exit?"),
        (["small", "exit=one"], "command line: exit must be a whole number, got the text 'one'"),
        (["small", "exit"], None),
        (["small", "--", "--other"], "sft/small takes no argument --other\n       train.py takes: --flag"),
        (["small", "+exit"], "command line: cannot read the override: expected '=' and a value"),
        (["small", "cluster.num_nodes=2"], "cluster.num_nodes=2, but this machine is one node"),
        (["small", "data.path=no.jsonl"], "command line: data.path: there is no file no.jsonl"),
        ([], "missing argument ID\n       how to use it: nemotron steps run -h"),
    ],
)
def test_a_wrong_command_runs_nothing_and_says_one_thing(
    tree: Path, nemotron: Nemotron, arguments: list[str], message: str | None
) -> None:
    done = nemotron("steps", "run", *arguments)
    if message is None:  # a bare word is the script's
        assert seen("out/sft")["argv"] == ["exit"]
        return
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {message}")
    assert "Traceback" not in done.stderr
    assert not Path("out").exists()


def test_a_bare_word_is_refused_by_a_step_that_takes_none(nemotron: Nemotron) -> None:
    done = nemotron("steps", "run", "dpo", "-c", "tiny", "dpo.max_num_steps", "5")
    assert done.returncode == 2
    assert done.stderr.startswith("error: rl/nemo_rl/dpo takes no arguments of its own, got 'dpo.max_num_steps'")


def test_the_scripts_exit_code_is_ours(tree: Path, nemotron: Nemotron) -> None:
    assert nemotron("steps", "run", "small", "exit=85").returncode == 85
    assert nemotron("steps", "run", "small", "exit=2").returncode == 2


def test_a_config_file_of_ones_own(tree: Path, nemotron: Nemotron) -> None:
    Path("mine.yaml").write_text(f"defaults: {tree}/sft/small/config/tiny\nexit: 0\noutput_dir: mine\n")
    assert nemotron("steps", "run", "small", "-c", "mine.yaml").returncode == 0
    assert Path("mine/seen.json").exists()


def test_every_shipped_config_composes(nemotron: Nemotron) -> None:
    for step in ("sft/megatron", "rl/nemo_rl/dpo"):
        for config in ("default", "tiny"):
            done = nemotron("steps", "run", step, "-c", config, "-d")
            assert done.returncode == 0, done.stderr
            assert yaml.safe_load(done.stdout)["output_dir"]


def test_documented_overrides_work(nemotron: Nemotron) -> None:
    done = nemotron(
        *(
            "steps",
            "run",
            "rl/nemo_rl/dpo",
            "-c",
            "default",
            "-d",
            "policy.model_name=meta-llama/Llama-3.2-3B-Instruct",
        ),
        *("policy.train_global_batch_size=64", "policy.optimizer.lr=1.0e-6", "dpo.reference_policy_kl_penalty=0.2"),
    )
    assert done.returncode == 0, done.stderr
    data = yaml.safe_load(done.stdout)
    assert data["policy"]["megatron_cfg"]["optimizer"]["lr"] == 1e-6
    assert data["policy"]["tokenizer"]["name"] == "meta-llama/Llama-3.2-3B-Instruct"


def test_the_readmes_misspelt_key_is_refused_with_its_line(tmp_path: Path, nemotron: Nemotron) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        f"defaults: {REPOSITORY}/steps/rl/nemo_rl/dpo/config/tiny\n\ndpo:\n  reference_policy_kl_penaltyy: 1\n"
    )
    done = nemotron("steps", "run", "dpo", "-c", str(mine))
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {mine}:4: unknown key dpo.reference_policy_kl_penaltyy\n"
        "       did you mean dpo.reference_policy_kl_penalty?\n"
    )


def in_terminal(*arguments: str, **more: str) -> str:
    """What the command shows on a terminal; `more` goes into its environment."""
    main, side = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm", "COLUMNS": "160", **more}
    command = [sys.executable, "-m", "nemotron_launch", *arguments]
    process = subprocess.Popen(command, stdout=side, stderr=side, stdin=side, env=env)
    os.close(side)
    shown = b""
    while True:
        try:
            read = os.read(main, 65536)
        except OSError:
            break
        if not read:
            break
        shown += read
    assert process.wait(timeout=60) == 0, shown.decode()
    os.close(main)
    return shown.decode()


def test_show_and_dry_run_work_on_a_terminal(tree: Path) -> None:
    assert "parameters" in in_terminal("steps", "show", "pairs")
    assert "output_dir" in in_terminal("steps", "run", "pairs", "-d")
