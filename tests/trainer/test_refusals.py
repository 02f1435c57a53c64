"""Bad input is refused with one message and exit code 2, before anything is changed; trouble with the disk with 1."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runs import STEPS, Finished, Run, end, refuse, until

pytestmark = pytest.mark.slow
Change = Callable[[Run], Run]


def edit(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def rows(run: Run, text: str) -> Run:
    """The run with other training rows."""
    edit(run.folder / "rows.jsonl", text)
    return run.with_(data__train__data_path=str(run.folder / "rows.jsonl"))


def pair(chosen: str = "a", rejected: str = "b") -> str:
    return json.dumps({"prompt": "p", "chosen": chosen, "rejected": rejected}) + "\n"


def start_from(run: Run, path: Path) -> Run:
    return run.with_(checkpointing__pretrained_checkpoint__path=str(path))


# A fresh DPO run: what is wrong with it, and what the message must name.
FRESH: dict[str, tuple[Change, list[str]]] = {
    "missing data file": (
        lambda run: run.with_(data__train__data_path="nowhere.jsonl"),
        ["data.train.data_path: no such file: nowhere.jsonl"],
    ),
    "missing validation file": (
        lambda run: run.with_(data__validation__data_path="nowhere.jsonl"),
        ["data.validation.data_path: no such file: nowhere.jsonl"],
    ),
    "empty data": (lambda run: rows(run, ""), ["data.train: the data holds no rows"]),
    "too many bad rows": (
        lambda run: rows(run, pair() * 8 + pair("same", "same") + "{torn\n"),
        ["data.train: 2 of 10 rows are bad", "rows.jsonl:9", "rows.jsonl:10", "max_bad_rows"],
    ),
    "fewer rows than a batch": (
        lambda run: rows(run, pair() * 7),
        ["policy.train_global_batch_size: 7 rows do not fill one batch of 8"],
    ),
    "no checkpoint there": (
        lambda run: start_from(run, run.folder / "nowhere"),
        ["checkpointing.pretrained_checkpoint.path: there is no checkpoint", "nowhere"],
    ),
    "a folder that is no checkpoint": (
        lambda run: start_from(run, STEPS["dpo"]),
        ["checkpointing.pretrained_checkpoint.path", "is not a checkpoint: it has SKILL.md", "give a step_N folder"],
    ),
    "another shape": (
        lambda run: run.with_(policy__architecture__hidden_size=64, policy__architecture__tie_word_embeddings=False),
        [
            "checkpointing.pretrained_checkpoint.path: the checkpoint has another shape",
            "hidden_size: 32 in the checkpoint, 64 in the config",
            "tie_word_embeddings: True in the checkpoint, False in the config",
        ],
    ),
    "another shape of bare weights": (
        lambda run: start_from(run, bare_weights(run)).with_(policy__architecture__intermediate_size=64),
        [
            "bare/iter_0000007: does not fit the policy:",
            "decoder.layers.mlp.linear_fc2.weight: (1, 32, 32) there, (1, 32, 64) here",
        ],
    ),
    "another chat template": (
        lambda run: run.with_(policy__tokenizer__chat_template=None),
        [
            "checkpointing.pretrained_checkpoint.path: the checkpoint was trained with another tokenizer",
            "policy.tokenizer.name=",
            "name them alone: checkpointing.pretrained_checkpoint.path=",
        ],
    ),
    "torn weights": (
        lambda run: start_from(run, torn(run)),
        ["cannot be read as a Megatron checkpoint"],
    ),
    "bf16 without a GPU": (lambda run: run.with_(policy__precision="bfloat16"), ["policy.precision"]),
    "a metric that is never measured": (
        lambda run: run.with_(checkpointing__metric_name="train:reward"),
        ["checkpointing.metric_name: there is no metric train:reward", "there are train:accuracy"],
    ),
    "a validation metric that is never measured": (
        lambda run: run.with_(checkpointing__metric_name="val:validation-default_reward"),
        ["checkpointing.metric_name: there is no metric val:validation-default_reward"],
    ),
}


def weights_of(run: Run) -> Path:
    checkpoints = Path(run.options["checkpointing.pretrained_checkpoint.path"])
    return checkpoints / "step_7/policy/weights/iter_0000000"


def bare_weights(run: Run) -> Path:
    """The warm start's tensors as another tool would leave them: nothing beside them."""
    return Path(shutil.copytree(weights_of(run), run.folder / "bare/iter_0000007"))


def torn(run: Run) -> Path:
    """A torn copy of the warm start."""
    copy = run.folder / "torn/step_7"
    shutil.copytree(weights_of(run).parents[2], copy)
    tear(copy)
    return copy


def tear(checkpoint: Path) -> None:
    """Leave the first tenth of its tensors, which begin with the weights."""
    for file in checkpoint.glob("policy/weights/iter_0000000/*.distcp"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 10])


@pytest.fixture(scope="module")
def fresh(dpo) -> dict[str, tuple[Run, Finished]]:
    runs = {}
    for name, (change, _) in FRESH.items():
        run = dpo()
        run.folder.mkdir(exist_ok=True)
        runs[name] = change(run)
    return {name: (runs[name], finished) for name, finished in refuse(runs).items()}


def assert_one_message(finished: Finished, parts: list[str]) -> None:
    assert finished.code == 2, finished.said
    assert "Traceback" not in finished.said
    errors = [line for line in finished.said.splitlines() if "error:" in line]
    assert len(errors) == 1, finished.said
    for part in parts:
        assert part in finished.said


@pytest.mark.parametrize("case", FRESH)
def test_a_fresh_run_with_bad_input_is_refused(fresh, case):
    run, finished = fresh[case]
    assert_one_message(finished, FRESH[case][1])
    assert not run.checkpoints.exists()
    assert "error: " in (run.out / "train.log").read_text()


# A run that was killed after step 2 was saved: what has changed since, and what the message must name.
RESUMED: dict[str, tuple[Change, list[str]]] = {
    "another config": (
        lambda run: run.with_(dpo__reference_policy_kl_penalty=0.3, policy__train_global_batch_size=16),
        [
            "step_2 was trained with another config",
            "dpo.reference_policy_kl_penalty: 0.1 there, 0.3 here",
            "policy.train_global_batch_size: 8 there, 16 here",
            "checkpointing.allow_config_change=true",
        ],
    ),
    "another shape": (
        lambda run: run.with_(
            policy__architecture__num_layers=2,
            checkpointing__allow_config_change=True,
        ),
        ["num_layers: 1 in the checkpoint, 2 in the config"],
    ),
    "other rows under the same name": (
        lambda run: (edit(run.folder / "data/train.jsonl", pair() * 48), run)[1],
        ["step_2 was trained with another config", "data.train (its rows' fingerprint)"],
    ),
    "another tokenizer under the same config": (
        lambda run: change_info(run, tokenizer="0" * 64),
        ["step_2 was trained with another config", "policy.tokenizer (its fingerprint): 000000000000 there"],
    ),
    "torn training_info.json": (
        lambda run: (edit(run.checkpoints / "step_2/training_info.json", '{"step": 2,'), run)[1],
        ["step_2/training_info.json: cannot be read, so step_2 is damaged", "to go on from the start"],
    ),
    "empty training_info.json": (
        lambda run: (edit(run.checkpoints / "step_2/training_info.json", "{}"), run)[1],
        ["step_2/training_info.json: lacks epoch, step"],
    ),
    "torn config.yaml": (
        lambda run: (edit(run.checkpoints / "step_2/config.yaml", "a: [1"), run)[1],
        ["step_2/config.yaml: is not YAML"],
    ),
    "torn tensors": (
        lambda run: (tear(run.checkpoints / "step_2"), run)[1],
        ["step_2/policy/weights/iter_0000000: cannot be read as a Megatron checkpoint"],
    ),
    "replaced warm start": (
        lambda run: replace_warm_start(run),
        ["these are not the weights from which this run began", "it began from", "give another output_dir"],
    ),
    "missing warm start": (
        lambda run: (shutil.rmtree(run.options["checkpointing.pretrained_checkpoint.path"]), run)[1],
        ["checkpointing.pretrained_checkpoint.path: there is no checkpoint"],
    ),
}


def change_info(run: Run, **changes: object) -> Run:
    edit(run.checkpoints / "step_2/training_info.json", json.dumps({**run.info(2), **changes}))
    return run


def replace_warm_start(run: Run) -> Run:
    """Put the weights of step 6 where those of step 7 were."""
    checkpoints = Path(run.options["checkpointing.pretrained_checkpoint.path"])
    shutil.rmtree(checkpoints / "step_7/policy")
    shutil.copytree(checkpoints / "step_6/policy", checkpoints / "step_7/policy")
    return run


@pytest.fixture(scope="module")
def resumed(dpo, warm_start, tmp_path_factory) -> dict[str, tuple[Run, list[str], Finished]]:
    """Of each case: the run, the files of its output folder before, and how the attempt to resume ended."""
    killed = dpo()
    assert killed.go(patch="at_call(policy.Policy, 'train_step', 4, kill)").code == 128 + signal.SIGKILL
    runs, before = {}, {}
    for name, (change, _) in RESUMED.items():
        folder = tmp_path_factory.mktemp("resumed")
        shutil.copytree(killed.folder, folder, dirs_exist_ok=True)
        shutil.copytree(warm_start.checkpoints, folder / "warm_start")
        runs[name] = change(start_from(Run("dpo", folder, killed.options), folder / "warm_start"))
        before[name] = contents(runs[name])
    return {name: (runs[name], before[name], finished) for name, finished in refuse(runs).items()}


def contents(run: Run) -> list[str]:
    """Everything below the output folder but the log, which tells of the refusal."""
    files = (path for path in run.out.rglob("*") if path.is_file() and path.name not in ("train.log", ".lock"))
    return sorted(f"{path.relative_to(run.out)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)


@pytest.mark.parametrize("case", RESUMED)
def test_a_resume_that_would_mix_two_runs_is_refused(resumed, case):
    run, before, finished = resumed[case]
    assert_one_message(finished, RESUMED[case][1])
    if case != "torn tensors":  # found when metrics.jsonl has been cut back already, as every resume does
        assert contents(run) == before


def test_a_changed_config_goes_on_where_that_is_allowed(resumed):
    run = resumed["another config"][0].with_(
        checkpointing__allow_config_change=True, policy__train_global_batch_size=8, dpo__max_num_steps=3
    )
    finished = run.go()
    assert finished.code == 0, finished.said
    assert "resuming with another config: dpo.reference_policy_kl_penalty: 0.1 there, 0.3 here" in finished.said


def test_weights_named_alone_train_with_another_chat_template(dpo):
    run = dpo(dpo__max_num_steps=1)
    run = start_from(run, weights_of(run)).with_(policy__tokenizer__chat_template=None)
    finished = run.go()
    assert finished.code == 0, finished.said


# Through spawn: what several processes make of it, and what spawn itself refuses.


def test_sizes_that_do_not_divide_the_started_processes_are_one_message(dpo):
    # The config is of two processes, which the launcher would have started.
    run = dpo(procs=2, policy__megatron_cfg__tensor_model_parallel_size=2)
    assert_one_message(run.go(procs=3), ["tensor 2 x pipeline 1 = 2 does not divide the 3 processes"])


def test_what_one_rank_cannot_read_ends_all_at_once_with_its_message(dpo):
    began = time.monotonic()
    patch = """
        from nemotron_launch.trainer.data import sources
        def lost(path, where):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        if RANK == 1: sources._READERS = {**sources._READERS, ".jsonl": lost}
    """
    finished = dpo(procs=2).go("--grace-seconds", 30, patch=patch)
    assert_one_message(finished, ["data/train.jsonl: no such file or directory"])
    assert time.monotonic() - began < 30  # nobody waited for the grace to end


def test_ranks_that_read_different_rows_are_refused(dpo):
    patch = """
        import nemotron_launch.trainer.dpo as dpo
        load = dpo.load_data
        def reversed_(session):
            pairs, validation = load(session)
            return pairs[::-1], validation
        if RANK == 1: dpo.load_data = reversed_
    """
    assert_one_message(dpo(procs=2).go(patch=patch), ["data.train: rank 1 has other rows than rank 0"])


def test_an_error_of_one_rank_alone_ends_the_others_after_the_grace(dpo):
    patch = """
        def broken():
            raise ZeroDivisionError("a defect")
        if RANK == 1: at_call(policy.Policy, "train_step", 2, broken)
    """
    finished = dpo(procs=2).go("--grace-seconds", 1, patch=patch)
    assert finished.code == 1
    assert "rank 1 ended first, with exit code 1" in finished.said
    assert "ZeroDivisionError: a defect" in finished.said


@pytest.mark.parametrize("place", ["a file", "read-only"])
def test_an_output_folder_that_cannot_be_written_is_one_message(dpo, tmp_path, place, request):
    run = dpo()
    if place == "a file":
        edit(run.out, "")
        said = f"error: {run.out}: file exists"
    else:
        mount(request, run.out, "-t", "tmpfs", "-o", "ro", "tmpfs")
        said = f"error: {run.out}/.lock: read-only file system"
    assert_one_message(run.go(), [said])


def test_a_missing_config_is_one_message(tmp_path):
    command = [sys.executable, str(STEPS["dpo"] / "train.py"), "--config", str(tmp_path / "nowhere.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path}/nowhere.yaml: no such file or directory\n")


def test_a_second_run_in_the_same_folder_is_refused_and_named_the_first(dpo):
    run = dpo(dpo__max_num_steps=100000, dpo__max_num_epochs=100000, checkpointing__save_period=100000)
    first = run.start()
    try:
        until(lambda: len(run.metrics()) > 2, first)
        refused = run.go()
        assert_one_message(refused, [f"{run.out}: another run is writing here", f"it is process {first.pid} on "])
        assert not (run.out / "exit_code").exists()
        first.send_signal(signal.SIGTERM)
        assert end(first).code == 85
        assert (run.out / "exit_code").read_text() == "85\n"
    finally:
        first.kill()
        first.communicate()


# A disk that is full. Tmpfs needs root, as CI has it.


def mount(request: pytest.FixtureRequest, folder: Path, *options: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small file system here: {done.stderr.strip()}")
    request.addfinalizer(lambda: subprocess.run(["umount", "--lazy", str(folder)], check=True))


@pytest.fixture
def small_disk(request, tmp_path) -> Iterator[Path]:
    """A file system of 2 MiB: a checkpoint of the small run takes 0.3."""
    mount(request, tmp_path / "disk", "-t", "tmpfs", "-o", "size=2m", "tmpfs")
    return tmp_path / "disk"


def fill(disk: Path, leave: int) -> Path:
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "ballast").write_bytes(bytes(free - leave))
    return disk / "ballast"


def test_a_full_disk_ends_the_run_with_one_message_and_room_lets_it_go_on(small_disk):
    run = Run("sft", small_disk)
    run.config()
    ballast = fill(small_disk, 500 * 1024)
    finished = run.go()
    assert finished.code == 1, finished.said
    assert "Traceback" not in finished.said
    assert f"error: {small_disk}/out/checkpoints: step 4 could not be saved: no space left on device" in finished.said
    assert f"last good checkpoint: {small_disk}/out/checkpoints/step_2" in finished.said
    assert run.saved() == [2]
    assert {path.name for path in run.checkpoints.iterdir()} == {"step_2"}
    ballast.unlink()
    finished = run.go()
    assert finished.code == 0, finished.said
    assert [line["step"] for line in run.metrics()] == list(range(1, 8))


def test_a_disk_that_takes_no_metrics_ends_the_run_with_one_message(small_disk):
    run = Run("sft", small_disk).with_(checkpointing__enabled=False)
    run.config()
    fill(small_disk, 24 * 1024)
    finished = run.with_(sft__max_num_steps=100, sft__val_period=0, sft__max_num_epochs=100).go()
    assert finished.code == 1, finished.said
    assert "Traceback" not in finished.said
    assert "no space left on device" in finished.said
