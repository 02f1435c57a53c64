"""TensorBoard, Weights & Biases and MLflow, each imported only when the config's `logger` section turns it on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.exit_codes import FAILED

IDS = "logger_ids.json"


@dataclass(frozen=True)
class MetricLogger:
    """log(step, numbers under flat keys); close(exit code of the run)."""

    name: str
    log: Callable[[int, Mapping[str, float]], None]
    close: Callable[[int], None]


def open_loggers(
    logger: Mapping[str, Any], output_dir: Path, *, config: Mapping[str, Any], resume_step: int
) -> list[MetricLogger]:
    """The loggers that are on, their own files in the next free `exp_NNN` of `logger.log_dir`, as NeMo-RL has it.

    W&B and MLflow go on with the run of the attempt before, whose id `logger_ids.json` in the output folder keeps,
    unless this attempt starts from step 0.
    """
    openers = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
    wanted = [name for name in openers if logger.get(f"{name}_enabled")]
    if not wanted:
        return []
    ids_file = output_dir / IDS
    ids = json.loads(ids_file.read_text()) if resume_step and ids_file.exists() else {}
    folder = _next_free(Path(logger.get("log_dir") or output_dir / "logs"))
    opened = [openers[name](dict(logger.get(name) or {}), folder, config, ids) for name in wanted]
    ids_file.write_text(json.dumps(ids))
    return opened


def _next_free(log_dir: Path) -> Path:
    taken = [int(path.name[4:]) for path in log_dir.glob("exp_*") if path.name[4:].isdecimal()]
    folder = log_dir / f"exp_{max(taken, default=0) + 1:03d}"
    folder.mkdir(parents=True)
    return folder


def _tensorboard(options: dict[str, Any], folder: Path, config: Mapping[str, Any], ids: dict[str, str]) -> MetricLogger:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise _missing("tensorboard") from error
    writer = SummaryWriter(str(folder / "tensorboard"))

    def log(step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return MetricLogger("TensorBoard", log, lambda _: writer.close())


def _wandb(options: dict[str, Any], folder: Path, config: Mapping[str, Any], ids: dict[str, str]) -> MetricLogger:
    try:
        import wandb
    except ImportError as error:
        raise _missing("wandb") from error
    same_run = {"id": ids["wandb"], "resume": "allow"} if "wandb" in ids else {}
    try:
        run = wandb.init(dir=str(folder), config=dict(config), **{**same_run, **_given(options)})
    except (wandb.Error, TypeError) as error:
        raise UserError(
            f"Weights & Biases refuses to start: {error}", where="logger.wandb", exit_code=FAILED
        ) from error
    ids["wandb"] = run.id
    # Steps that the former attempt logged already are dropped there; they have the same values.
    return MetricLogger("Weights & Biases", lambda step, metrics: run.log(dict(metrics), step=step), run.finish)


def _mlflow(options: dict[str, Any], folder: Path, config: Mapping[str, Any], ids: dict[str, str]) -> MetricLogger:
    try:
        import mlflow
    except ImportError as error:
        raise _missing("mlflow") from error
    given = _given(options)
    try:
        if "tracking_uri" in given:
            mlflow.set_tracking_uri(given["tracking_uri"])
        name = given.get("experiment_name")
        if name and "artifact_location" in given and mlflow.get_experiment_by_name(name) is None:
            mlflow.create_experiment(name, artifact_location=given["artifact_location"])
        if name:
            mlflow.set_experiment(name)
        run_id = given.get("run_id") or ids.get("mlflow")
        run = mlflow.start_run(run_id=run_id, run_name=None if run_id else given.get("run_name"))
        mlflow.log_dict(dict(config), "config.json")
    except mlflow.MlflowException as error:
        raise UserError(f"MLflow refuses to start: {error}", where="logger.mlflow", exit_code=FAILED) from error
    ids["mlflow"] = run.info.run_id
    return MetricLogger(
        "MLflow",
        lambda step, metrics: mlflow.log_metrics(dict(metrics), step=step),
        lambda exit_code: mlflow.end_run("FINISHED" if exit_code == 0 else "FAILED"),
    )


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _missing(package: str) -> UserError:
    hint = f"pip install 'nemotron-launch[{package}]', or set logger.{package}_enabled=false"
    return UserError(f"the package {package} is not installed", where=f"logger.{package}_enabled", hint=hint)
