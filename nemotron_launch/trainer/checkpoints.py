"""The folders `step_N` of a run: written whole or not at all, kept by metric and age, found again; no tensors.

A checkpoint is complete if and only if its folder is named `step_<number>` and its `training_info.json` can be read.
Other names are passing states of it, which a kill may leave behind and `CheckpointStore.clean` puts right:

    tmp_step_N    being written
    old_step_N    the former step_N while a new one takes its place
    trash_step_N  being removed

As in NeMo-RL, but for `trash_`: there a kill in the middle of a removal leaves half a checkpoint that looks whole.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemotron_launch.errors import UserError

log = logging.getLogger(__name__)

INFO = "training_info.json"
WEIGHTS = Path("policy", "weights", "iter_0000000")
_STEP = re.compile(r"step_(0|[1-9]\d*)")
_PASSING = re.compile(r"(tmp|old|trash)_step_(0|[1-9]\d*)")
_MUST_SAVE_BY = re.compile(r"(\d+):(\d\d):(\d\d):(\d\d)")


class CheckpointStore:
    """The checkpoints of one run in `folder`. One process uses it for changes (rank 0); reading is for all.

    keep_top_k: of those whose step save_period divides, the best by metric_name (by age without one) are kept; null
    keeps them all. ft_keep_latest_k: the newest that are kept besides. Both null: all are kept. The newest always is.
    metric_name: "train:…" or "val:…", a key of training_info.json; a missing or not finite value ranks last, of equal
    ones the newer ranks first.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_top_k: int | None,
        save_period: int,
        metric_name: str | None,
        higher_is_better: bool,
        ft_keep_latest_k: int | None = None,
        ft_save_period: int | None = None,
    ) -> None:
        if metric_name is not None and not metric_name.startswith(("train:", "val:")):
            hint = f"write train:{metric_name} or val:{metric_name}"
            raise UserError(f"{metric_name} does not say its source", where="checkpointing.metric_name", hint=hint)
        self.folder = folder
        self.keep_top_k = keep_top_k
        self.save_period = save_period
        self.metric_name = metric_name
        self.higher_is_better = higher_is_better
        self.ft_keep_latest_k = ft_keep_latest_k
        self.ft_save_period = ft_save_period

    def clean(self) -> list[str]:
        """Put right what a killed run left behind; returns what was done, one sentence each. Before anything else."""
        done = []
        for path in _children(self.folder):
            match = _PASSING.fullmatch(path.name)
            if match and match[1] == "old" and not is_complete(self._path(int(match[2]))):
                done.append(self._end_swap(int(match[2])))
        for path in _children(self.folder):
            if _PASSING.fullmatch(path.name):
                shutil.rmtree(path)
                done.append(f"removed {path.name}, left by an interrupted run")
        return done

    def _end_swap(self, step: int) -> str:
        """step_N has left for old_step_N: let the new one take its place if it is whole, else the old one return."""
        new, old, final = self.tmp_path(step), self._old_path(step), self._path(step)
        if final.exists():
            self._remove(final)
        source = new if read_info(new) is not None else old
        source.rename(final)
        fsync(self.folder)
        return f"completed the interrupted replacement of {final.name} with {source.name}"

    def complete_steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending."""
        return sorted(_complete(self.folder))

    def latest(self) -> Path | None:
        """The newest complete checkpoint, from which a run resumes; None when there is none."""
        return newest_complete(self.folder)

    def newest_to_resume(self) -> Path | None:
        """The checkpoint from which a run goes on: `latest`.

        Raises UserError where a step folder of a later step lacks a readable training_info.json. No kill leaves that
        behind, so somebody must look; going on without a word could undo days.
        """
        named = (match for path in _children(self.folder) if (match := _STEP.fullmatch(path.name)))
        newest = max((int(match[1]) for match in named), default=None)
        if newest is not None and newest not in _complete(self.folder):
            older = self.latest()
            go_on = f"from {older.name}" if older else "from the start"
            raise UserError(
                f"cannot be read, so {self._path(newest).name} is damaged",
                where=str(self._path(newest) / INFO),
                hint=f"restore it, or remove {self._path(newest)} to go on {go_on}",
            )
        return self.latest()

    def best(self) -> Path | None:
        """The best complete checkpoint by metric; the newest, with a warning, when none has it or none is named."""
        complete = _complete(self.folder)
        if not complete:
            return None
        ranked = [step for step in complete if self._has_metric(complete[step])]
        if not ranked:
            log.warning("no checkpoint in %s has the metric %s: taking the newest", self.folder, self.metric_name)
        return self._path(self._by_rank(complete, ranked or list(complete))[0])

    def begin(self, step: int) -> Path:
        """A new empty folder to write step's checkpoint into; `commit` makes it count. Other ranks: `tmp_path`."""
        temporary = self.tmp_path(step)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        return temporary

    def tmp_path(self, step: int) -> Path:
        """Where step's checkpoint is written until it is committed."""
        return self.folder / f"tmp_step_{step}"

    def commit(self, step: int, info: Mapping[str, Any]) -> Path:
        """Make step's checkpoint count, all ranks having written their part of it. Returns its folder.

        info: {epoch, step, total_steps, consumed_samples, total_valid_tokens, …metrics} and, for ranking, the value
        under the metric's full name. It is written last; then the rename makes the checkpoint, on disk also after a
        power cut.
        """
        temporary, final, old = self.tmp_path(step), self._path(step), self._old_path(step)
        fsync_tree(temporary)
        with (temporary / INFO).open("w") as file:
            json.dump(_as_json(info), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        fsync(temporary)
        if final.exists():
            if old.exists():
                self._remove(old)
            final.rename(old)
        temporary.rename(final)
        fsync(self.folder)
        if old.exists():
            self._remove(old)
        return final

    def prune(self) -> list[int]:
        """Remove what need not be kept; returns the removed steps, ascending."""
        complete = _complete(self.folder)
        if not complete or (self.keep_top_k is None and self.ft_keep_latest_k is None):
            return []
        newest_first = sorted(complete, reverse=True)
        periodic = [step for step in complete if step % self.save_period == 0]
        keep = {newest_first[0], *newest_first[: self.ft_keep_latest_k or 0]}
        keep.update(self._by_rank(complete, periodic)[: self.keep_top_k])
        removed = sorted(set(complete) - keep)
        for step in removed:
            self._remove(self._path(step))
        return removed

    def should_save(self, step: int, *, last: bool = False, stopping: bool = False) -> bool:
        """Whether to save after `step`: it is the last, the ranks agreed to stop, or one of the periods is over."""
        periods = [period for period in (self.save_period, self.ft_save_period) if period]
        return last or stopping or any(step % period == 0 for period in periods)

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step}"

    def _old_path(self, step: int) -> Path:
        return self.folder / f"old_step_{step}"

    def _by_rank(self, complete: Mapping[int, Mapping[str, Any]], steps: Iterable[int]) -> list[int]:
        def rank(step: int) -> tuple[float, int]:
            if not self._has_metric(complete[step]):
                return (math.inf, -step)
            value = float(complete[step][self.metric_name or ""])
            return (-value if self.higher_is_better else value, -step)

        return sorted(steps, key=rank)

    def _has_metric(self, info: Mapping[str, Any]) -> bool:
        value = info.get(self.metric_name) if self.metric_name else None
        return isinstance(value, int | float) and math.isfinite(value)

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint so that at no moment half of it looks like one."""
        trash = self.folder / f"trash_step_{path.name.rsplit('_', 1)[1]}"
        if trash.exists():
            shutil.rmtree(trash)
        path.rename(trash)
        shutil.rmtree(trash)


def read_info(step_folder: Path) -> dict[str, Any] | None:
    """What `training_info.json` holds; None when it is missing or torn."""
    try:
        info = json.loads((step_folder / INFO).read_text())
    except (OSError, ValueError):
        return None
    return info if isinstance(info, dict) else None


def is_complete(path: Path) -> bool:
    return _STEP.fullmatch(path.name) is not None and read_info(path) is not None


def metric_value(name: str | None, *, train: Mapping[str, Any], val: Mapping[str, Any] | None) -> float | None:
    """The value by which a checkpoint is ranked, for `info[name]`.

    None when no metric is named, or when its source had no measurement at this step (no validation). Raises
    UserError when the source was measured but has no such metric: it never will.
    """
    if name is None:
        return None
    source, _, key = name.partition(":")
    metrics = train if source == "train" else val
    if not metrics:
        return None
    if key not in metrics:
        known = ", ".join(f"{source}:{known}" for known in sorted(metrics))
        raise UserError(f"there is no metric {name}", where="checkpointing.metric_name", hint=f"there are {known}")
    return float(metrics[key])


def resolve_checkpoint(path: Path, *, where: str | None = None) -> Path:
    """The checkpoint that a user means by `path`: a complete step folder, or a folder of torch_dist weights.

    A step_N folder is itself; a folder of step_N (or a run's output folder, with them in `checkpoints/`) is its newest
    complete one; a weights folder (`policy/weights/iter_*`, or the folder of such) is that of the newest iteration.
    Anything else is a UserError that says what is there instead.
    """
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}", where=where, hint=_nearest(path))
    if path.is_dir():
        if is_complete(path) or is_weights(path):
            return path
        for folder in (path, path / "checkpoints"):
            if complete := newest_complete(folder):
                return complete
        if newest := _newest_weights(path):
            return newest
    hint = _EXPECTED
    if (path / "config.json").is_file():
        hint = f"convert it:  nemotron steps run convert/hf_to_megatron hf_path={path}"
    raise UserError(f"{path} is not a checkpoint: {_what_is(path)}", where=where, hint=hint)


def newest_complete(folder: Path) -> Path | None:
    """The newest complete step_N in `folder`; None where there is none."""
    complete = _complete(folder)
    return folder / f"step_{max(complete)}" if complete else None


def weights_dir(checkpoint: Path) -> Path:
    """The torch_dist folder of what `resolve_checkpoint` found."""
    if is_weights(checkpoint):
        return checkpoint
    weights = _newest_weights(checkpoint / WEIGHTS.parent)
    if weights is None:
        if (checkpoint / "hf" / "config.json").is_file():
            raise UserError(f"{checkpoint} has no Megatron weights: its model is {checkpoint / 'hf'}, for transformers")
        raise UserError(f"{checkpoint} has no weights", hint=f"{checkpoint / WEIGHTS} is missing or has no metadata")
    return weights


def parse_must_save_by(text: str | None, *, where: str = "checkpointing.checkpoint_must_save_by") -> float | None:
    """ "DD:HH:MM:SS" in seconds since the start of the process; None stays None."""
    if text is None:
        return None
    match = _MUST_SAVE_BY.fullmatch(text)
    if not match or int(match[2]) > 23 or int(match[3]) > 59 or int(match[4]) > 59:
        hint = 'days:hours:minutes:seconds, for example "00:03:45:00"'
        raise UserError(f"{text!r} is not a time span", where=where, hint=hint)
    days, hours, minutes, seconds = (int(part) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def out_of_time(elapsed_s: float, mean_step_s: float, must_save_by_s: float | None) -> bool:
    """Whether one more step would pass `checkpoint_must_save_by`. Clocks differ: let the ranks agree on it."""
    return must_save_by_s is not None and elapsed_s + mean_step_s >= must_save_by_s


_EXPECTED = "give a step_N folder, a folder of step_N folders, or a policy/weights/iter_* folder"


def _what_is(path: Path) -> str:
    if path.is_file():
        return "it is a file"
    names = [child.name for child in _children(path)]
    if not names:
        return "it is empty"
    if _STEP.fullmatch(path.name):
        return f"its {INFO} is missing or torn, so it was not written to the end"
    unfinished = [name for name in names if _STEP.fullmatch(name) or _PASSING.fullmatch(name)]
    if unfinished:
        return f"it has unfinished ones only ({', '.join(unfinished[:5])})"
    if "config.json" in names:
        return "it is a Hugging Face model"
    return f"it has {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"


def _nearest(path: Path) -> str:
    """What exists on the way to a missing path."""
    parent = next((parent for parent in path.parents if parent.exists()), Path())
    names = [child.name for child in _children(parent)]
    return f"{parent} has {', '.join(names[:8]) or 'nothing in it'}{', …' if len(names) > 8 else ''}"


def is_weights(path: Path) -> bool:
    """Whether a folder holds torch_dist weights."""
    # torch_dist: metadata.json is megatron-core's, .metadata torch's; a step folder has neither.
    return (path / "metadata.json").is_file() and (path / ".metadata").is_file()


def _newest_weights(folder: Path) -> Path | None:
    """The iteration of the highest number in `folder`; we write iter_0000000 only, Megatron-LM one for each save."""
    found = [child for child in _children(folder) if child.name.startswith("iter_") and is_weights(child)]
    return max(found, key=lambda child: child.name, default=None)


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _complete(folder: Path) -> dict[int, dict[str, Any]]:
    """Step number → training info of each complete checkpoint in `folder`."""
    found = {}
    for path in _children(folder):
        match = _STEP.fullmatch(path.name)
        if match and (info := read_info(path)) is not None:
            found[int(match[1])] = info
    return found


def _as_json(value: Any) -> Any:
    """Numbers of any library as Python's; those that are not finite as null, which JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fsync(path: Path) -> None:
    """Have a file, or a folder's list of names, on disk before this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """`fsync` of everything below a folder."""
    for path in folder.rglob("*"):
        fsync(path)
