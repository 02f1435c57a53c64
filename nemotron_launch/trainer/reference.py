"""The frozen reference policy of DPO and GRPO: its log-probabilities kept, its weights resident, or offloaded.

Every kind starts from the run's warm start. Legend: M pairs, N = 2·M sequences.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from nemotron_launch.trainer import warm_start
from nemotron_launch.trainer.agreement import on_rank_0
from nemotron_launch.trainer.batch import Batch
from nemotron_launch.trainer.data.order import Position
from nemotron_launch.trainer.data.preference import PreferencePair
from nemotron_launch.trainer.loop import LoopConfig, visiting_order
from nemotron_launch.trainer.losses import sequence_logps
from nemotron_launch.trainer.megatron import parallel
from nemotron_launch.trainer.policy import Policy
from nemotron_launch.trainer.rollouts import Sampling
from nemotron_launch.trainer.setup import Session, new_policy
from nemotron_launch.trainer.validation import padded, shares
from nemotron_launch.trainer.warm_start import WarmStart

if TYPE_CHECKING:
    from nemotron_launch.trainer.dpo import PreferenceTask

log = logging.getLogger(__name__)
# Between two looks for a wish to stop, while the reference is computed.
MICRO_BATCHES = 16
SECONDS_BETWEEN_WRITES = 60.0


class Score(Protocol):
    """Log-probabilities of micro-batches, as `Policy.logps` computes them."""

    def __call__(self, batches: Sequence[Batch], sampling: Sampling | None = None) -> list[Tensor]: ...


class Reference(Protocol):
    """Log-probabilities under the reference."""

    def training(self, parts: Sequence[np.ndarray], batches: Sequence[Batch]) -> list[Tensor]:
        """Summed log-probability [N], fp64, of each sequence of the micro-batches; parts: their row indices."""

    def validation(self, name: str, parts: Sequence[np.ndarray], batches: Sequence[Batch]) -> list[Tensor]:
        """The same for a validation set; index -1 is a filler."""

    def logps(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Log-probability of each token, for sequences that are in no file."""


class OnlineReference:
    """Scores each batch when it comes, with weights that stay on the device or are swapped in."""

    def __init__(self, score: Score) -> None:
        self.logps = score

    def training(self, parts: Sequence[np.ndarray], batches: Sequence[Batch]) -> list[Tensor]:
        scored = zip(self.logps(batches), batches, strict=True)
        return [sequence_logps(logps_NR, batch.mask_NR) for logps_NR, batch in scored]

    def validation(self, name: str, parts: Sequence[np.ndarray], batches: Sequence[Batch]) -> list[Tensor]:
        return self.training(parts, batches)


class StoredReference:
    """Keeps one number per sequence, computed once before the first step; needs no second model to train.

    sums: "train" and each validation set's name to [M, 2], fp64 (chosen, rejected; NaN where it was not needed).
    """

    def __init__(self, sums: dict[str, np.ndarray], score: Score, device: torch.device) -> None:
        self.sums = sums
        self.logps = score
        self.device = device

    def training(self, parts: Sequence[np.ndarray], batches: Sequence[Batch]) -> list[Tensor]:
        return [self._of("train", part) for part in parts]

    def validation(self, name: str, parts: Sequence[np.ndarray], batches: Sequence[Batch]) -> list[Tensor]:
        return [self._of(f"validation-{name}", part) for part in parts]

    def _of(self, name: str, part: np.ndarray) -> Tensor:
        sums_M2 = np.where(part[:, None] >= 0, self.sums[name][part], 0.0)
        return torch.from_numpy(sums_M2.reshape(-1)).to(self.device)


def open_reference(
    session: Session, policy: Policy, start: WarmStart, task: PreferenceTask, loop: LoopConfig
) -> Reference:
    """The reference as `dpo.reference` says. `policy` must still hold the warm start's weights."""
    kind = session.config["dpo"]["reference"]
    if kind != "stored":
        return OnlineReference(frozen_logps(session, policy, start, kind=kind))
    generates = task.check is not None
    weights = policy.weights() if generates else {}
    sums = _stored_sums(session, policy, start, task, loop)
    return StoredReference(sums, _swapped(policy, weights), policy.layout.device)


def frozen_logps(session: Session, policy: Policy, start: WarmStart, *, kind: str) -> Score:
    """Log-probabilities under the warm start's weights, which `policy` must still hold.

    kind: "resident" keeps a second model on the device, "offloaded" its weights in host memory, swapped in to score.
    """
    if kind == "resident":
        frozen = new_policy(session)
        warm_start.load(frozen, start)
        return frozen.logps
    return _swapped(policy, policy.weights())


def _swapped(policy: Policy, weights: Mapping[str, Tensor]) -> Score:
    def score(batches: Sequence[Batch], sampling: Sampling | None = None) -> list[Tensor]:
        with policy.other_weights(weights):
            return policy.logps(batches, sampling)

    return score


def _stored_sums(
    session: Session, policy: Policy, start: WarmStart, task: PreferenceTask, loop: LoopConfig
) -> dict[str, np.ndarray]:
    """Sums for every pair that the run will visit, from the file beside the checkpoints or computed now.

    Incomplete (NaN) where the ranks agreed to stop meanwhile; what was computed is kept in the file.
    """
    visited = np.unique(np.concatenate(visiting_order(loop, task.rows, position=Position(), steps=loop.total_steps)))
    wanted: dict[str, tuple[Sequence[PreferencePair], np.ndarray]] = {"train": (task.pairs, visited)}
    limit = task.section["val_batches"] * task.section["val_global_batch_size"]
    for name, pairs in task.validation.items():
        wanted[f"validation-{name}"] = (pairs, np.arange(min(len(pairs), limit) if limit > 0 else len(pairs)))
    key = _key(session, start, wanted)
    path = session.output_dir / "reference.npz"
    empty = {name: np.full((len(pairs), 2), np.nan) for name, (pairs, _) in wanted.items()}
    sums = on_rank_0(lambda: _read(path, key, empty))
    missing = sum(int(np.isnan(sums[name][indices]).any(axis=1).sum()) for name, (_, indices) in wanted.items())
    if missing:
        log.info("computing the reference's log-probabilities of %d pairs once", missing)
        written = time.monotonic()
        for name, (pairs, indices) in wanted.items():
            for part in _parts(pairs, indices, policy.layout.data * task.logprob_batch * MICRO_BATCHES):
                if not np.isnan(sums[name][part]).any():
                    continue
                if session.stop.agree(False, 0):
                    _write(session, path, key, sums)
                    log.info("asked to stop; the log-probabilities so far are in %s", path)
                    return sums
                sums[name][part] = _score(policy, task, pairs, part)
                if time.monotonic() - written > SECONDS_BETWEEN_WRITES:
                    _write(session, path, key, sums)
                    written = time.monotonic()
        _write(session, path, key, sums)
    return sums


def _parts(pairs: Sequence[PreferencePair], indices: np.ndarray, size: int) -> list[np.ndarray]:
    """Indices of pairs of similar length, about `size` at a time; the same in every attempt."""
    lengths = [len(pairs[i].chosen_ids) + len(pairs[i].rejected_ids) for i in indices]
    ordered = indices[np.argsort(lengths, kind="stable")]
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def _score(policy: Policy, task: PreferenceTask, pairs: Sequence[PreferencePair], part: np.ndarray) -> np.ndarray:
    """[len(part), 2] sums of the pairs of `part`, on every rank."""
    layout = policy.layout
    places = _dealt(padded(np.arange(len(part)), layout.data), layout.data)
    sums_M2 = torch.zeros(len(part), 2, dtype=torch.float64, device=layout.device)
    for share in shares(places, layout, task.logprob_batch):
        batch = task.batch([pairs[part[i]] if i >= 0 else None for i in share])
        scored_M2 = sequence_logps(policy.logps([batch])[0], batch.mask_NR).view(-1, 2)
        real = torch.from_numpy(share >= 0).to(layout.device)
        sums_M2[torch.from_numpy(share).to(layout.device)[real]] = scored_M2[real]
    parallel.sum_over_data(sums_M2)
    result: np.ndarray = sums_M2.cpu().numpy()
    return result


def _dealt(ordered: np.ndarray, ranks: int) -> np.ndarray:
    """Deal sorted rows to ranks like cards, so that each gets long and short ones."""
    return ordered.reshape(-1, ranks).T.reshape(-1)


def _key(session: Session, start: WarmStart, wanted: dict[str, tuple[Sequence[PreferencePair], np.ndarray]]) -> str:
    """Identifies what the sums depend on: weights, tokenizer, rows and how sequences are laid out."""
    digest = hashlib.sha256()
    head = [start.fingerprint, session.tokenizer.fingerprint, session.config["policy"]["precision"]]
    digest.update(json.dumps([*head, session.config["dpo"]["seed"]]).encode())
    for name, (pairs, indices) in wanted.items():
        digest.update(name.encode())
        digest.update(indices.tobytes())
        for i in indices:
            digest.update(pairs[i].chosen_ids.tobytes() + pairs[i].rejected_ids.tobytes())
    return digest.hexdigest()


def _read(path: Path, key: str, empty: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The stored sums where they are of this key and whole, else `empty`: they can always be computed again."""
    try:
        with np.load(path) as stored:
            if str(stored["key"]) != key:
                return empty
            sums = {name: stored[name] for name in empty}
    except FileNotFoundError:
        return empty
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s cannot be read (%s): it is made again", path, error)
        return empty
    fits = all(sums[name].shape == array.shape and sums[name].dtype == array.dtype for name, array in empty.items())
    return sums if fits else empty


def _write(session: Session, path: Path, key: str, sums: dict[str, np.ndarray]) -> None:
    """Keep the sums for the next attempt; on a disk that does not take them this one goes on without."""
    if not session.main_rank:
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, key=np.array(key), **sums)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        log.warning("%s is not kept (%s): a resumed run computes it again", path, error.strerror)
