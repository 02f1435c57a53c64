"""The frozen reference policy of DPO: its log-probabilities kept, its weights resident, or offloaded.

Every kind starts from the run's warm start. Legend: M pairs, N = 2·M sequences.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from nemotron_launch.trainer import warm_start
from nemotron_launch.trainer.batch import Batch
from nemotron_launch.trainer.data.order import Position
from nemotron_launch.trainer.data.preference import PreferencePair
from nemotron_launch.trainer.loop import LoopConfig, visiting_order
from nemotron_launch.trainer.losses import sequence_logps
from nemotron_launch.trainer.megatron import parallel
from nemotron_launch.trainer.policy import Policy
from nemotron_launch.trainer.setup import Session, new_policy
from nemotron_launch.trainer.validation import padded, shares
from nemotron_launch.trainer.warm_start import WarmStart

if TYPE_CHECKING:
    from nemotron_launch.trainer.dpo import PreferenceTask

log = logging.getLogger(__name__)
Score = Callable[[Sequence[Batch]], list[Tensor]]


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
    if kind == "resident":
        frozen = new_policy(session)
        warm_start.load(frozen, start)
        return OnlineReference(frozen.logps)
    generates = task.check is not None
    weights = policy.weights() if kind == "offloaded" or generates else {}

    def score(batches: Sequence[Batch]) -> list[Tensor]:
        with policy.other_weights(weights):
            return policy.logps(batches)

    if kind == "offloaded":
        return OnlineReference(score)
    return StoredReference(_stored_sums(session, policy, start, task, loop), score, policy.layout.device)


def _stored_sums(
    session: Session, policy: Policy, start: WarmStart, task: PreferenceTask, loop: LoopConfig
) -> dict[str, np.ndarray]:
    """Sums for every pair that the run will visit, from the file beside the checkpoints or computed now."""
    visited = np.unique(np.concatenate(visiting_order(loop, task.rows, position=Position(), steps=loop.total_steps)))
    wanted: dict[str, tuple[Sequence[PreferencePair], np.ndarray]] = {"train": (task.pairs, visited)}
    limit = task.section["val_batches"] * task.section["val_global_batch_size"]
    for name, pairs in task.validation.items():
        wanted[f"validation-{name}"] = (pairs, np.arange(min(len(pairs), limit) if limit > 0 else len(pairs)))
    key = _key(session, start, wanted)
    path = session.output_dir / "reference.npz"
    sums = _read(path, key)
    # All ranks score together or none does, whatever a shared file system showed each of them.
    if parallel.any_rank(sums is None, policy.layout.device) or sums is None:
        count = sum(len(indices) for _, indices in wanted.values())
        log.info("computing the reference's log-probabilities of %d pairs once", count)
        sums = {name: _score_pairs(policy, task, pairs, indices) for name, (pairs, indices) in wanted.items()}
        if session.main_rank:
            _write(path, key, sums)
    return sums


def _score_pairs(
    policy: Policy, task: PreferenceTask, pairs: Sequence[PreferencePair], indices: np.ndarray
) -> np.ndarray:
    """[M, 2] sums of the chosen rows of `pairs`, on every rank; similar lengths share a micro-batch."""
    layout = policy.layout
    lengths = [len(pairs[i].chosen_ids) + len(pairs[i].rejected_ids) for i in indices]
    ordered = padded(indices[np.argsort(lengths, kind="stable")], layout.data)
    sums_M2 = torch.zeros(len(pairs), 2, dtype=torch.float64, device=layout.device)
    for part in shares(_dealt(ordered, layout.data), layout, task.logprob_batch):
        batch = task.batch([pairs[i] if i >= 0 else None for i in part])
        scored_M2 = sequence_logps(policy.logps([batch])[0], batch.mask_NR).view(-1, 2)
        real = torch.from_numpy(part >= 0).to(layout.device)
        sums_M2[torch.from_numpy(part).to(layout.device)[real]] = scored_M2[real]
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


def _read(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """The stored sums where they are of this key; every rank reads the same file or none does."""
    try:
        with np.load(path) as stored:
            if str(stored["key"]) != key:
                return None
            return {name: stored[name] for name in stored.files if name != "key"}
    except (OSError, ValueError, KeyError, EOFError):
        return None


def _write(path: Path, key: str, sums: dict[str, np.ndarray]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez(file, key=np.array(key), **sums)  # type: ignore[arg-type]
    temporary.replace(path)
