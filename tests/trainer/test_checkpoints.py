"""Checkpoint folders: whole or absent after any kill, kept by metric and age, found again."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.checkpoints import (
    CheckpointStore,
    metric_value,
    out_of_time,
    parse_must_save_by,
    read_info,
    resolve_checkpoint,
    weights_dir,
)

LOSS = "val:validation-default_loss"


def store(folder: Path, **options: object) -> CheckpointStore:
    defaults = {"keep_top_k": None, "save_period": 10, "metric_name": LOSS, "higher_is_better": False}
    return CheckpointStore(folder, **{**defaults, **options})  # type: ignore[arg-type]


def save(checkpoints: CheckpointStore, step: int, **info: object) -> Path:
    weights = checkpoints.begin(step) / "policy" / "weights" / "iter_0000000"
    weights.mkdir(parents=True)
    for name in ("metadata.json", ".metadata", "__0_0.distcp"):
        (weights / name).write_text(f"{step}")
    return checkpoints.commit(step, {"step": step, **info})


def save_with_losses(checkpoints: CheckpointStore, losses: dict[int, float | None]) -> None:
    for step, loss in losses.items():
        save(checkpoints, step, **({} if loss is None else {LOSS: loss}))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_checkpoint_counts_from_its_commit_on(tmp_path):
    checkpoints = store(tmp_path)
    temporary = checkpoints.begin(10)
    assert (temporary, temporary.name) == (checkpoints.tmp_path(10), "tmp_step_10")
    assert checkpoints.latest() is None
    final = checkpoints.commit(10, {"step": 10, "epoch": 0})
    assert checkpoints.latest() == final == tmp_path / "step_10"
    assert read_info(final) == {"step": 10, "epoch": 0}
    assert names(tmp_path) == {"step_10"}


def test_training_info_is_valid_json_with_numbers_of_any_library(tmp_path):
    numpy = pytest.importorskip("numpy")
    save(store(tmp_path), 10, loss=numpy.float32(0.5), broken=float("nan"), nested={"count": numpy.int64(3)})
    text = (tmp_path / "step_10" / "training_info.json").read_text()
    assert json.loads(text) == {"step": 10, "loss": 0.5, "broken": None, "nested": {"count": 3}}
    assert "NaN" not in text


def test_a_second_save_of_a_step_replaces_the_first(tmp_path):
    checkpoints = store(tmp_path)
    save(checkpoints, 10, attempt=1)
    save(checkpoints, 10, attempt=2)
    assert (read_info(tmp_path / "step_10") or {})["attempt"] == 2
    assert names(tmp_path) == {"step_10"}


def test_begin_forgets_what_an_interrupted_save_wrote(tmp_path):
    checkpoints = store(tmp_path)
    (checkpoints.begin(10) / "half").write_text("x")
    assert list(checkpoints.begin(10).iterdir()) == []


def test_folders_that_only_look_like_checkpoints_do_not_count(tmp_path):
    save(store(tmp_path), 10)
    for name in ("step_20", "step_x", "tmp_step_30", "old_step_40", "step_050"):
        (tmp_path / name).mkdir()
        if name != "step_20":
            (tmp_path / name / "training_info.json").write_text("{}")
    (tmp_path / "step_60").mkdir()
    (tmp_path / "step_60" / "training_info.json").write_text('{"step": 6')
    assert store(tmp_path).complete_steps() == [10]


# Retention. Each expectation is NeMo-RL's rule worked out by hand.


def test_the_best_are_kept_and_the_newest_always(tmp_path):
    checkpoints = store(tmp_path, keep_top_k=2)
    save_with_losses(checkpoints, {10: 0.3, 20: 0.1, 30: 0.2, 40: 0.9})
    assert checkpoints.prune() == [10]
    assert checkpoints.complete_steps() == [20, 30, 40]


def test_a_greater_metric_can_be_the_better(tmp_path):
    checkpoints = store(tmp_path, keep_top_k=1, higher_is_better=True)
    save_with_losses(checkpoints, {10: 0.3, 20: 0.9, 30: 0.2, 40: 0.1})
    assert checkpoints.prune() == [10, 30]


def test_of_equal_ones_the_newer_is_kept(tmp_path):
    checkpoints = store(tmp_path, keep_top_k=1)
    save_with_losses(checkpoints, {10: 0.1, 20: 0.1, 30: 0.5})
    assert checkpoints.prune() == [10]


@pytest.mark.parametrize("missing", [None, float("nan"), float("inf")])
def test_a_missing_or_infinite_metric_ranks_last(tmp_path, missing):
    checkpoints = store(tmp_path, keep_top_k=1)
    save_with_losses(checkpoints, {10: 5.0, 20: missing, 30: missing})
    assert checkpoints.prune() == [20]


def test_without_a_metric_the_newest_are_kept(tmp_path):
    checkpoints = store(tmp_path, keep_top_k=2, metric_name=None)
    save_with_losses(checkpoints, {10: 0.1, 20: 0.2, 30: 0.3})
    assert checkpoints.prune() == [10]


def test_a_save_outside_the_period_is_not_ranked(tmp_path):
    checkpoints = store(tmp_path, keep_top_k=1)
    save_with_losses(checkpoints, {10: 0.5, 15: 0.1, 20: 0.7})
    assert checkpoints.prune() == [15]


def test_the_newest_k_are_kept_for_crash_recovery_besides(tmp_path):
    checkpoints = store(tmp_path, keep_top_k=1, ft_keep_latest_k=2, ft_save_period=5)
    save_with_losses(checkpoints, {10: 0.1, 15: None, 20: 0.5, 25: None, 30: 0.6, 35: None})
    assert checkpoints.prune() == [15, 20, 25]


def test_without_limits_all_are_kept(tmp_path):
    checkpoints = store(tmp_path)
    save_with_losses(checkpoints, {10: 0.1, 15: 0.2, 20: 0.3})
    assert checkpoints.prune() == []


def test_without_keep_top_k_the_crash_limit_removes_no_periodic_one(tmp_path):
    checkpoints = store(tmp_path, ft_keep_latest_k=1)
    save_with_losses(checkpoints, {10: 0.1, 15: 0.2, 20: 0.3, 25: 0.4})
    assert checkpoints.prune() == [15]


def test_best_is_by_metric_and_else_the_newest_with_a_warning(tmp_path, caplog):
    checkpoints = store(tmp_path)
    assert checkpoints.best() is None
    save_with_losses(checkpoints, {10: 0.2, 20: 0.1, 30: 0.3, 40: None})
    assert checkpoints.best() == tmp_path / "step_20"
    assert caplog.text == ""
    assert store(tmp_path, metric_name="val:other").best() == tmp_path / "step_40"
    assert "val:other" in caplog.text


def test_saves_come_at_the_periods_the_last_step_and_a_stop(tmp_path):
    checkpoints = store(tmp_path, ft_save_period=4)
    assert [step for step in range(1, 21) if checkpoints.should_save(step)] == [4, 8, 10, 12, 16, 20]
    assert checkpoints.should_save(7, last=True)
    assert checkpoints.should_save(7, stopping=True)


def test_a_metric_name_without_a_source_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not say its source"):
        store(tmp_path, metric_name="loss")


def test_a_metric_is_taken_from_its_source():
    train, val = {"loss": 2.0}, {"validation-default_loss": 1.0}
    assert metric_value(LOSS, train=train, val=val) == 1.0
    assert metric_value("train:loss", train=train, val=None) == 2.0
    assert metric_value(LOSS, train=train, val=None) is None
    assert metric_value(None, train=train, val=val) is None
    with pytest.raises(UserError) as error:
        metric_value("val:acuracy", train=train, val=val)
    assert "val:validation-default_loss" in str(error.value)


# Paths that a user gives.


def test_the_newest_complete_checkpoint_is_found_from_any_folder_above(tmp_path):
    checkpoints = store(tmp_path / "checkpoints")
    save_with_losses(checkpoints, {2: None, 10: None})
    checkpoints.begin(20)
    step_10 = tmp_path / "checkpoints" / "step_10"
    for path in (tmp_path, tmp_path / "checkpoints", step_10):
        assert resolve_checkpoint(path) == step_10
    weights = step_10 / "policy" / "weights" / "iter_0000000"
    assert resolve_checkpoint(weights) == resolve_checkpoint(weights.parent) == weights
    assert weights_dir(step_10) == weights_dir(weights) == weights


def test_an_older_step_can_be_named(tmp_path):
    save_with_losses(store(tmp_path), {2: None, 10: None})
    assert resolve_checkpoint(tmp_path / "step_2") == tmp_path / "step_2"


@pytest.mark.parametrize(
    ("make", "path", "said"),
    [
        (lambda folder: None, "nowhere", "there is no checkpoint"),
        (lambda folder: (folder / "a").mkdir(), "a", "it is empty"),
        (lambda folder: (folder / "a").write_text(""), "a", "it is a file"),
        (lambda folder: (folder / "tmp_step_5").mkdir(), "", "unfinished ones only (tmp_step_5)"),
        (lambda folder: (folder / "step_5" / "policy").mkdir(parents=True), "step_5", "not written to the end"),
        (lambda folder: (folder / "config.json").write_text("{}"), "", "Hugging Face model"),
        (lambda folder: (folder / "notes.txt").write_text(""), "", "it has notes.txt"),
    ],
)
def test_what_is_not_a_checkpoint_is_said_to_be_what_it_is(tmp_path, make, path, said):
    make(tmp_path)
    with pytest.raises(UserError) as error:
        resolve_checkpoint(tmp_path / path, where="checkpointing.pretrained_checkpoint.path")
    assert said in str(error.value)
    assert error.value.exit_code == 2


def test_a_step_without_weights_says_so(tmp_path):
    checkpoints = store(tmp_path)
    checkpoints.begin(1)
    with pytest.raises(UserError, match="has no weights"):
        weights_dir(checkpoints.commit(1, {}))


def test_must_save_by_is_days_hours_minutes_seconds():
    assert parse_must_save_by("01:02:03:04") == 93784.0  # 86400 + 2 * 3600 + 3 * 60 + 4
    assert parse_must_save_by(None) is None
    for wrong in ("1:2:3:4", "02:03:04", "00:24:00:00", "00:00:60:00", "soon"):
        with pytest.raises(UserError, match="not a time span"):
            parse_must_save_by(wrong)


def test_time_is_over_when_one_more_step_would_be_too_late():
    assert not out_of_time(80, 10, 100)
    assert out_of_time(90, 10, 100)
    assert not out_of_time(1e9, 10, None)


# What a kill leaves behind.


def test_clean_removes_unfinished_saves_and_half_removed_ones(tmp_path):
    checkpoints = store(tmp_path)
    save_with_losses(checkpoints, {10: None})
    (checkpoints.begin(20) / "half").write_text("x")
    (tmp_path / "trash_step_5" / "policy").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    assert len(checkpoints.clean()) == 2
    assert names(tmp_path) == {"step_10", "notes"}
    assert checkpoints.clean() == []


def test_clean_completes_a_swap_whose_new_checkpoint_is_whole(tmp_path):
    checkpoints = store(tmp_path)
    save(checkpoints, 10, attempt=1)
    (tmp_path / "step_10").rename(tmp_path / "old_step_10")
    (checkpoints.begin(10) / "training_info.json").write_text('{"attempt": 2}')
    assert checkpoints.clean()
    assert read_info(tmp_path / "step_10") == {"attempt": 2}
    assert names(tmp_path) == {"step_10"}


def test_clean_rolls_a_swap_back_whose_new_checkpoint_is_not_whole(tmp_path):
    checkpoints = store(tmp_path)
    save(checkpoints, 10, attempt=1)
    (tmp_path / "step_10").rename(tmp_path / "old_step_10")
    checkpoints.begin(10)
    assert checkpoints.clean()
    assert (read_info(tmp_path / "step_10") or {})["attempt"] == 1
    assert names(tmp_path) == {"step_10"}


def test_clean_of_a_folder_that_does_not_exist_does_nothing(tmp_path):
    assert store(tmp_path / "new").clean() == []


LOOP = textwrap.dedent("""
    import itertools, sys
    from pathlib import Path
    from nemotron_launch.trainer.checkpoints import CheckpointStore
    checkpoints = CheckpointStore(
        Path(sys.argv[1]), keep_top_k=1, save_period=1, metric_name="val:x", higher_is_better=False, ft_keep_latest_k=2
    )
    checkpoints.clean()
    steps = checkpoints.complete_steps()
    print("ready", flush=True)
    for step in itertools.count(steps[-1] if steps else 1):  # the newest is written again first: a swap
        weights = checkpoints.begin(step) / "weights"
        weights.mkdir()
        for part in range(5):
            (weights / f"{part}").write_bytes(bytes([step % 256]) * 20_000)
        checkpoints.commit(step, {"step": step, "val:x": (step * 7) % 5})
        if step % 3 == 0:
            checkpoints.begin(step)
            (checkpoints.tmp_path(step) / "weights").mkdir()
            for part in range(5):
                (checkpoints.tmp_path(step) / "weights" / f"{part}").write_bytes(bytes([step % 256]) * 20_000)
            checkpoints.commit(step, {"step": step, "val:x": (step * 7) % 5})
        checkpoints.prune()
""")


def test_a_kill_at_any_moment_leaves_a_whole_newest_checkpoint_and_no_rubbish(tmp_path):
    draw = random.Random(0)
    checkpoints = store(tmp_path / "run")
    reached = 0
    for _ in range(20):
        child = subprocess.Popen([sys.executable, "-c", LOOP, tmp_path / "run"], stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        time.sleep(draw.uniform(0, 0.12))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        if not (tmp_path / "run").exists():
            continue
        checkpoints.clean()
        assert all(name.startswith("step_") for name in names(tmp_path / "run"))
        for step in checkpoints.complete_steps():
            parts = sorted((tmp_path / "run" / f"step_{step}" / "weights").iterdir())
            assert [part.read_bytes() for part in parts] == [bytes([step % 256]) * 20_000] * 5
        assert {f"step_{step}" for step in checkpoints.complete_steps()} == names(tmp_path / "run")
        newest = max(checkpoints.complete_steps(), default=0)
        assert newest >= reached
        reached = newest
    assert reached > 0


EVERY_OPERATION = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    from nemotron_launch.trainer.checkpoints import CheckpointStore, read_info

    TOUCHES_FILES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
    left = -1

    def kill_when_none_is_left(event, _):
        global left
        if event in TOUCHES_FILES:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def save(step, attempt):
        weights = checkpoints.begin(step) / "weights"
        weights.mkdir()
        (weights / "part").write_text(f"{step} {attempt}")
        checkpoints.commit(step, {"step": step, "attempt": attempt})

    kills = 0
    while True:
        folder = Path(sys.argv[1]) / f"{kills}"
        checkpoints = CheckpointStore(
            folder, keep_top_k=1, save_period=1, metric_name=None, higher_is_better=False
        )
        save(1, 1)
        save(2, 1)
        child = os.fork()
        if child == 0:
            left = kills + 1
            sys.addaudithook(kill_when_none_is_left)
            checkpoints.clean()
            save(2, 2)  # takes the place of step 2
            save(3, 1)
            checkpoints.prune()  # removes 1 and 2
            os._exit(0)
        _, status = os.waitpid(child, 0)
        checkpoints.clean()
        complete = checkpoints.complete_steps()
        assert complete and complete[-1] >= 2, (kills, complete)
        assert sorted(path.name for path in folder.iterdir()) == sorted(f"step_{step}" for step in complete)
        for step in complete:
            attempt = read_info(folder / f"step_{step}")["attempt"]
            assert (folder / f"step_{step}" / "weights" / "part").read_text() == f"{step} {attempt}", kills
        if os.WIFEXITED(status):
            break
        kills += 1
    assert complete == [3]
    print(kills)
""")


def test_a_kill_before_each_single_file_operation_leaves_a_whole_newest_checkpoint(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", EVERY_OPERATION, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert int(done.stdout) > 30
