"""metrics.jsonl, train.log, the terminal and the loggers."""

from __future__ import annotations

import json
import logging
import math
import os
import pty
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.metrics import MetricsLog, train_log

OFF = {"tensorboard_enabled": False, "wandb_enabled": False, "mlflow_enabled": False}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_steps(folder: Path, steps: range, logger: dict | None = None, **options: object) -> None:
    with MetricsLog(folder, logger or OFF, **options) as metrics:  # type: ignore[arg-type]
        for step in steps:
            metrics.log(step, 0, {"train": {"loss": 1 / step, "accuracy": 0.5}, "timing/train/total": 0.1})


def test_a_step_is_one_line_of_flat_keys(tmp_path):
    with MetricsLog(tmp_path, OFF) as metrics:
        metrics.log(1, 3, {"train": {"loss": 0.5}, "validation-default": {"accuracy": 1}, "timing/train/total": 2.0})
    (line,) = lines(tmp_path)
    assert line.pop("time") > 1.7e9
    assert line == {
        "step": 1,
        "epoch": 3,
        "train/loss": 0.5,
        "validation-default/accuracy": 1,
        "timing/train/total": 2.0,
    }


def test_a_line_says_how_many_steps_the_run_will_make(tmp_path):
    with MetricsLog(tmp_path, OFF) as metrics, metrics.progress(7, 0):
        metrics.log(1, 0, {"train/loss": 1.0})
    assert [line["total_steps"] for line in lines(tmp_path)] == [7]


def test_a_line_is_in_the_file_before_log_returns(tmp_path):
    metrics = MetricsLog(tmp_path, OFF)
    metrics.log(1, 0, {"train/loss": 1.0})
    assert len(lines(tmp_path)) == 1
    metrics.close()


def test_numbers_that_json_lacks_become_null(tmp_path):
    with MetricsLog(tmp_path, OFF) as metrics:
        metrics.log(1, 0, {"train/loss": math.nan, "train/grad_norm": math.inf})
    (line,) = lines(tmp_path)
    assert line["train/loss"] is None
    assert line["train/grad_norm"] is None


def test_numbers_of_other_libraries_are_taken(tmp_path):
    numpy = pytest.importorskip("numpy")
    with MetricsLog(tmp_path, OFF) as metrics:
        metrics.log(1, 0, {"train/loss": numpy.float32(0.5), "train/count": numpy.int64(3)})
    assert (lines(tmp_path)[0]["train/loss"], lines(tmp_path)[0]["train/count"]) == (0.5, 3)


def test_resume_cuts_back_to_the_resumed_step_and_goes_on(tmp_path):
    run_steps(tmp_path, range(1, 8))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "train/lo')  # killed in the middle of a write
    run_steps(tmp_path, range(6, 9), resume_step=5)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_validation_before_the_first_step_survives_a_resume(tmp_path):
    with MetricsLog(tmp_path, OFF) as metrics:
        metrics.log(0, 0, {"validation-default/loss": 1.0})
        metrics.log(1, 0, {"train/loss": 1.0})
    run_steps(tmp_path, range(2, 3), resume_step=1)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]


def test_a_start_from_scratch_leaves_nothing_of_the_former_attempt(tmp_path):
    run_steps(tmp_path, range(1, 4))
    run_steps(tmp_path, range(1, 2))
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_a_torn_line_in_the_middle_does_not_stop_a_resume(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step\n[2]\n\xff\n{"step": 2}\n')
    run_steps(tmp_path, range(3, 4), resume_step=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_train_log_has_times_and_every_step_and_appends(tmp_path):
    for resume in (0, 2):
        with train_log(tmp_path):
            logging.getLogger("nemotron_launch.trainer.loop").info("attempt from step %d", resume)
            run_steps(tmp_path, range(resume + 1, resume + 3), resume_step=resume)
    text = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" INFO ")[1] for line in text] == [
        "attempt from step 0",
        "step 1  loss 1  accuracy 0.5",
        "step 2  loss 0.5  accuracy 0.5",
        "attempt from step 2",
        "step 3  loss 0.3333  accuracy 0.5",
        "step 4  loss 0.25  accuracy 0.5",
    ]
    assert text[0][:2] == "20"  # the year
    assert logging.getLogger("nemotron_launch").handlers == []


SCRIPT = textwrap.dedent("""
    import logging, sys
    from pathlib import Path
    from nemotron_launch.trainer.metrics import MetricsLog, train_log
    with train_log(Path(sys.argv[1])):
        with MetricsLog(Path(sys.argv[1]), {}) as metrics, metrics.progress(30, 0):
            for step in range(1, 31):
                metrics.log(step, 0, {"train": {"loss": 0.25, "accuracy": 0.7}, "timing/train/tokens_per_sec": 12345.6})
                if step == 15:
                    logging.getLogger("nemotron_launch.x").info("saved [step_15]")
        assert "torch" not in sys.modules and "wandb" not in sys.modules
""")


def test_other_ranks_write_nothing(tmp_path):
    with MetricsLog(tmp_path / "out", {**OFF, "wandb_enabled": True}, enabled=False) as metrics, metrics.progress(2, 0):
        metrics.log(1, 0, {"train/loss": 1.0})
        metrics.sync()
    assert not (tmp_path / "out").exists()


def test_words_before_the_first_number_are_in_the_same_log_once(tmp_path):
    words = logging.getLogger("nemotron_launch.trainer.data")
    with train_log(tmp_path):
        words.info("before")
        with MetricsLog(tmp_path, OFF):
            words.info("meanwhile")
        words.info("after")
    words.info("too late")
    text = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" INFO ")[1] for line in text] == ["before", "meanwhile", "after"]


def test_a_pipe_gets_messages_and_few_step_lines(tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path], capture_output=True, text=True, check=True)
    shown = done.stderr.splitlines()
    assert len(shown) == 2  # the first step's line and the message; the run is shorter than the 10 s between lines
    assert shown[0].endswith("step 1/30  loss 0.25  accuracy 0.7  12,346 tokens/s")
    assert shown[1].endswith("saved [step_15]")
    assert "\x1b" not in done.stderr


def test_a_terminal_gets_a_bar_with_the_messages_above_it(tmp_path):
    controller, terminal = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, tmp_path],
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            shown += (chunk := os.read(controller, 65536))
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
    assert child.wait() == 0
    text = shown.decode()
    assert "30/30" in text
    assert "12,346 tokens/s" in text
    assert "saved [step_15]" in text
    assert "1/30  loss" not in text  # step lines are for the file


def test_tensorboard_gets_every_step(tmp_path):
    pytest.importorskip("tensorboard")
    pytest.importorskip("torch")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for attempt in (1, 2):
        logger = {**OFF, "tensorboard_enabled": True, "log_dir": str(tmp_path / "logs")}
        run_steps(tmp_path, range(1, 4), logger)
        events = EventAccumulator(str(tmp_path / "logs" / f"exp_{attempt:03d}" / "tensorboard"))
        events.Reload()
        assert [(point.step, round(point.value, 4)) for point in events.Scalars("train/loss")] == [
            (1, 1.0),
            (2, 0.5),
            (3, 0.3333),
        ]


def test_wandb_gets_every_step_offline_and_a_resume_keeps_its_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = {**OFF, "wandb_enabled": True, "wandb": {"project": "test", "name": None}}
    run_steps(tmp_path, range(1, 3), logger)
    first = json.loads((tmp_path / "logger_ids.json").read_text())
    run_steps(tmp_path, range(3, 4), logger, resume_step=2)
    assert json.loads((tmp_path / "logger_ids.json").read_text()) == first
    files = sorted(
        path.parent.parent.parent.name
        for path in tmp_path.glob(f"logs/exp_*/wandb/offline-run-*/run-{first['wandb']}.wandb")
    )
    assert files == ["exp_001", "exp_002"]


def test_mlflow_gets_every_step_and_a_resume_goes_on_in_the_same_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # recent ones want a database by default
    uri = (tmp_path / "mlruns").as_uri()
    logger = {**OFF, "mlflow_enabled": True, "mlflow": {"experiment_name": "test", "tracking_uri": uri}}
    run_steps(tmp_path, range(1, 3), logger, config={"dpo": {"seed": 1}})
    run_steps(tmp_path, range(3, 4), logger, resume_step=2)
    run_id = json.loads((tmp_path / "logger_ids.json").read_text())["mlflow"]
    client = mlflow.MlflowClient(uri)
    history = client.get_metric_history(run_id, "train/loss")
    assert [(point.step, round(point.value, 4)) for point in history] == [(1, 1.0), (2, 0.5), (3, 0.3333)]
    assert client.get_run(run_id).info.status == "FINISHED"


@pytest.mark.parametrize("package", ["wandb", "mlflow", "tensorboard"])
def test_a_missing_logger_says_how_to_install_it(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)  # what Python itself does for a module that must not be found
    if package == "tensorboard":
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError) as error:
        MetricsLog(tmp_path, {**OFF, f"{package}_enabled": True})
    assert f"pip install 'nemotron-launch[{package}]'" in str(error.value)
    assert error.value.where == f"logger.{package}_enabled"


def test_a_logger_that_breaks_does_not_cost_the_run(tmp_path):
    with MetricsLog(tmp_path, OFF) as metrics:
        from nemotron_launch.trainer.metric_loggers import MetricLogger

        def broken(step: int, numbers: object) -> None:
            raise ConnectionError("server gone")

        metrics._loggers.append(MetricLogger("Broken", broken, lambda _: None))
        metrics.log(1, 0, {"train/loss": 1.0})
        metrics.log(2, 0, {"train/loss": 1.0})
    assert len(lines(tmp_path)) == 2
    words = (tmp_path / "train.log").read_text()
    assert words.count("WARNING Broken takes no more metrics (server gone); metrics.jsonl has them all") == 1
