"""A run, or several beside each other, as data that a page draws: JSON-ready, small whatever a run has written."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from nemotron_launch import __version__
from nemotron_launch.jobs.run_folder import Progress
from nemotron_launch.reports.figures import figures_of, time_parts
from nemotron_launch.reports.metrics_file import MetricsFile
from nemotron_launch.reports.sources import RunFiles, config_of
from nemotron_launch.secret_names import is_secret_name

FORMAT = 1
POINTS = 1000  # of a curve: more than a screen has columns for
_POINTS_OF_ALL = 6000  # shared by the runs of one page
_FEWEST = 40
_WHOLE_CONFIGS = 8  # runs whose configs a page shows side by side; of the others what differs
_VALUES = 40_000  # points of all curves of a run
_SAMPLES = 60  # answers that a page shows of a run
_LONGEST_TEXT = 4000  # characters of an answer
_TILES = 8
# What a run is known by, the first ones first; better: whether a high or a low value is wanted.
_RESULTS = (
    ("validation/accuracy", "held-out reward", "high"),
    ("validation/greedy_accuracy", "greedy reward", "high"),
    ("validation-default/exact_match", "exact match", "high"),
    ("validation-default/accuracy", "validation accuracy", "high"),
    ("validation-default/loss", "validation loss", "low"),
    ("train/reward", "reward", "high"),
    ("train/accuracy", "accuracy", "high"),
    ("train/loss", "loss", ""),
    ("train/reference_kl", "KL to reference", ""),
    ("validation-default/kl_to_reference", "KL to reference", ""),
    ("train/approx_entropy", "entropy", ""),
    ("train/truncation_rate", "truncated", ""),
    ("train/mean_gen_tokens_per_sample", "answer length", ""),
    ("timing/train/tokens_per_sec", "tokens/s", "high"),
)
_MASK = "•••"
# Tokens of well-known services, and passwords in addresses, wherever they were written.
_TOKENS = re.compile(
    r"\b(?:hf_|nvapi-|sk-|gh[pousr]_|github_pat_|glpat-|xox[abp]-)[\w-]{8,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)


def report_data(
    runs: Sequence[RunFiles],
    *,
    progress: Mapping[str, Progress] | None = None,
    warnings: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    lineage: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Several runs as one page shows them: each, the plots that they share, and in what they differ.

    progress: of runs, by name (jobs.run_folder). warnings: by name, as `signs` finds them. lineage: nodes and links
    around all of them (artifacts.lineage).
    """
    points = max(_FEWEST, min(POINTS, _POINTS_OF_ALL // max(1, len(runs))))
    found = [
        run_data(
            one,
            points=points,
            progress=(progress or {}).get(one.name),
            warnings=(warnings or {}).get(one.name, ()),
        )
        for one in runs
    ]
    differing = differences([one["config"] for one in found])
    for one in found[_WHOLE_CONFIGS:]:
        one["config"] = {key: one["config"][key] for key in differing if key in one["config"]}
    names = list(dict.fromkeys(name for one in runs for name in one.metrics().names))
    return {
        "format": FORMAT,
        "version": __version__,
        "results": [
            {"metric": name, "label": label, "better": better} for name, label, better in _RESULTS if name in names
        ][:_TILES],
        "runs": found,
        "figures": [figure.as_data() for figure in figures_of(names)],
        "lineage": lineage,
        "differences": differing,
    }


def run_data(
    one: RunFiles,
    *,
    points: int = POINTS,
    progress: Progress | None = None,
    warnings: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """A run: what it is, its config by key, its curves with at most `points` points, what it wrote, how it ended.

    A curve is {"x": steps, "y": means} and, where several steps share a point, "lo" and "hi", the least and greatest
    of them; null where a step has no number. Secrets are masked.
    """
    metrics, config = one.metrics(), config_of(one)
    points = max(_FEWEST, min(points, _VALUES // max(1, len(metrics.names))))
    return {
        "name": one.name,
        **_row(one, config),
        "last_step": metrics.last_step,
        "total_steps": total_steps(metrics, config),
        "updated": _last(metrics.times),
        "config": flat_config(config),
        "metrics": curves(metrics, points),
        "last": {name: _number(_last_known(metrics.values(name))) for name in metrics.names},
        "time_shares": time_shares(metrics),
        "attempts": _attempts(progress, metrics),
        "samples": _shown_samples(one.samples),
        "problems": list(metrics.problems),
        "bad_lines": metrics.bad_lines,
        "warnings": [dict(warning) for warning in warnings],
    }


def _row(one: RunFiles, config: Mapping[str, Any]) -> dict[str, Any]:
    run = one.run
    if run is None:
        return {"step": "", "config_name": "", "state": "", "output_dir": one.output_dir, "overrides": []}
    return {
        "step": run.step,
        "config_name": run.config,
        "config_sha256": run.config_sha256,
        "state": run.state,
        "reason": run.reason,
        "exit_code": run.exit_code,
        "profile": run.profile,
        "executor": run.executor,
        "host": run.host,
        "nodes": run.nodes,
        "job_id": run.job_id,
        "sweep": run.sweep,
        "point": run.point,
        "attempt": run.attempt,
        "created": run.created,
        "submitted": run.submitted,
        "started": run.started,
        "ended": run.ended,
        "overrides": [_masked_override(text) for text in run.overrides],
        "output_dir": run.output_dir,
    }


def total_steps(metrics: MetricsFile, config: Mapping[str, Any]) -> int | None:
    """How many steps a run will make, as it says itself, or at most, as its config says."""
    if said := metrics.values("total_steps"):
        return int(said[-1])
    for section in config.values():
        if isinstance(section, Mapping) and isinstance(section.get("max_num_steps"), int):
            return int(section["max_num_steps"])
    return None


def _attempts(progress: Progress | None, metrics: MetricsFile) -> list[dict[str, Any]]:
    if progress is None:
        return []
    return [{**vars(attempt), "nodes": dict(attempt.nodes)} for attempt in progress.attempts]


# Curves.


def curves(metrics: MetricsFile, points: int) -> dict[str, Any]:
    """Every metric's curve. Those of the same steps share their list: {"axes": [steps], "of": {name: {axis, y}}}."""
    axes: list[list[float]] = []
    known: dict[bytes, int] = {}
    found: dict[str, Any] = {}
    for name in metrics.names:
        if name in ("epoch", "total_steps"):
            continue
        steps, values = metrics.steps(name), metrics.values(name)
        assert isinstance(steps, array)
        bytes_ = steps.tobytes()
        x, curve = thinned(steps, values, points)
        if name == "time":  # to the millisecond, not to six digits
            curve = {"y": [None if value is None else round(value, 3) for value in _times(values, points)]}
        axis = known.setdefault(bytes_, len(axes))
        if axis == len(axes):
            axes.append(x)
        found[name] = {"axis": axis, **curve}
    return {"axes": axes, "of": found}


def _times(values: Sequence[float], points: int) -> list[float | None]:
    """The times of the steps that `thinned` keeps."""
    count = len(values)
    if count > points:
        values = [values[(i * count // points + (i + 1) * count // points - 1) // 2] for i in range(points)]
    return [value if math.isfinite(value) else None for value in values]


def thinned(
    steps: Sequence[int], values: Sequence[float], points: int
) -> tuple[list[float], dict[str, list[float | None]]]:
    """A curve in at most `points` points: each the mean of as many steps, with the least and greatest of them."""
    count = len(steps)
    if count <= points:
        return list(steps), {"y": [_number(value) for value in values]}
    values = values.tolist() if isinstance(values, array) else values
    x: list[float] = []
    y: list[float | None] = []
    lo: list[float | None] = []
    hi: list[float | None] = []
    for i in range(points):
        start, end = i * count // points, (i + 1) * count // points
        part: Sequence[float] = values[start:end]
        total = sum(part)
        if not math.isfinite(total):
            part = [value for value in part if math.isfinite(value)]
            total = sum(part)
        x.append(steps[(start + end - 1) // 2])
        y.append(_number(total / len(part)) if part else None)
        lo.append(_number(min(part)) if part else None)
        hi.append(_number(max(part)) if part else None)
    return x, {"y": y, "lo": lo, "hi": hi}


def _number(value: float | None) -> float | None:
    """With as many digits as a reader can use; None where there is no number."""
    if value is None or not math.isfinite(value):
        return None
    if value == int(value) and abs(value) < 1e15:
        return int(value)
    return float(f"{value:.6g}")


def _last(values: Sequence[float]) -> float | None:
    return values[-1] if values else None


def _last_known(values: Sequence[float]) -> float | None:
    return next((value for value in reversed(values) if math.isfinite(value)), None)


def time_shares(metrics: MetricsFile) -> list[dict[str, Any]]:
    """Where the time went, in seconds over the whole run: the parts of steps, validation, and what is left."""

    def seconds(name: str) -> float:
        return sum(value for value in metrics.values(name) if math.isfinite(value))

    total = seconds("timing/train/total_step_time")
    parts = [(label, seconds(name)) for name, label in time_parts(metrics.names)]
    if parts:
        parts.append(("rest of the step", max(0.0, total - sum(spent for _, spent in parts))))
    elif total:
        parts.append(("training", total))
    validation = sum(seconds(name) for name in metrics.names if name.startswith("timing/validation/total"))
    parts.append(("validation", validation))
    return [{"part": label, "seconds": _number(spent)} for label, spent in parts if spent > 0]


# Configs.


def flat_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config by full key; lists of plain values as they are. Values of keys that name secrets are masked."""
    found: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, Mapping) and value:
            for name, below in value.items():
                walk(below, f"{key}.{name}" if key else str(name))
        elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
            for number, item in enumerate(value):
                walk(item, f"{key}.{number}")
        else:
            found[key] = _masked(key, value)

    if config:
        walk(config, "")
    return found


def differences(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all configs, without those that say where output goes."""
    keys = dict.fromkeys(key for config in configs for key in config)
    missing = object()
    return [
        key
        for key in keys
        if not key.endswith(("_dir", "output_dir")) and len({repr(config.get(key, missing)) for config in configs}) > 1
    ]


def _masked(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_masked(key, item) for item in value]
    if isinstance(value, str) and value:
        # Keys such as prompt_key or api_key_env hold names of columns or variables: api_key, hf_token do not.
        words = key.rpartition(".")[2]
        return _MASK if _holds_secret(words) else _TOKENS.sub(_MASK, value)
    if value is None or isinstance(value, bool | int | str):
        return value
    return _finite(value) if isinstance(value, float) else str(value)


def _holds_secret(name: str) -> bool:
    lowered = name.lower()
    if lowered.endswith("_key") and not re.search(r"(api|access|secret|private|auth)_?key$", lowered):
        return False  # the column of a data file
    return is_secret_name(name)


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _masked_override(text: str) -> str:
    key, equals, value = text.partition("=")
    return f"{key}={_MASK}" if equals and value and _holds_secret(key.rpartition(".")[2]) else _TOKENS.sub(_MASK, text)


# Samples.


def _shown_samples(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The answers that are worth reading: of the last steps, those with the greatest and the least rewards."""
    train = [row for row in samples if row.get("kind") != "validation"]
    held_out = [row for row in samples if row.get("kind") == "validation"]
    half = _SAMPLES // 2
    return [_sample(row) for row in (*train[-half:], *held_out[-half:])]


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    reward, step = row.get("reward"), row.get("step")
    return {
        "step": step if isinstance(step, int) else None,
        "kind": _text(row.get("kind")),
        "source": _text(row.get("source")),
        "question": _text(row.get("question")),
        "answer": _text(row.get("answer")),
        "reward": _number(float(reward)) if isinstance(reward, int | float) else None,
        "tokens": row.get("tokens") if isinstance(row.get("tokens"), int) else None,
        "truncated": row.get("truncated") is True,
        "error": _text(row.get("error")),
    }


def _text(value: Any) -> str:
    text = "" if value is None else _TOKENS.sub(_MASK, str(value))
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} … ({len(text)} characters)"
