"""Preference pairs as the steps rl/nemo_rl/dpo and rm/hf train on them: read, told apart, counted."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.agreement import same_everywhere
from nemotron_launch.trainer.data.preference import PreferencePair, load_preferences
from nemotron_launch.trainer.data.sources import data_section
from nemotron_launch.trainer.setup import Session, fingerprint
from nemotron_launch.trainer.start import Rows

log = logging.getLogger(__name__)


def load_data(session: Session) -> tuple[list[PreferencePair], dict[str, list[PreferencePair]]]:
    """Training pairs, and validation pairs by the name that their metrics carry."""
    data = session.config["data"]

    def load(section: Mapping[str, object] | None, key: str, split: str) -> list[PreferencePair]:
        pairs, bad = load_preferences(
            data_section(data, section, split=split),
            tokenizer=session.tokenizer,
            max_length=data["max_input_seq_length"] or session.config["policy"]["max_total_sequence_length"],
            step_dir=session.step_dir,
            max_bad_rows=data["max_bad_rows"],
            key=key,
        )
        if session.main_rank and (text := bad.summary()):
            log.warning("%s: %s", key, text)
        if not pairs:
            raise UserError("holds no usable pair", where=key)
        return pairs

    training = load(data["train"], "data.train", "train")
    validation = {}
    if data["validation"] is not None:
        validation["default"] = load(data["validation"], "data.validation", "validation")
    for name, path in (data["val_data_paths"] or {}).items():
        validation[name] = load({"data_path": path}, f"data.val_data_paths.{name}", "train")
    return training, validation


def rows_of(pairs: Sequence[PreferencePair], section: str) -> Rows:
    """The training pairs, as a run starts with them. section: dpo or rm."""
    rows = fingerprint(array for pair in pairs for array in (pair.chosen_ids, pair.rejected_ids))
    return Rows(section, len(pairs), same_everywhere(rows, what="other rows", where="data.train"), "pairs")


def counts(pairs: Sequence[PreferencePair]) -> dict[str, float]:
    """What a global batch holds; those that are too long count in its tokens only."""
    valid = [pair for pair in pairs if not pair.overlong]
    return {
        "tokens": float(sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)),
        "global_valid_seqs": 2.0 * len(valid),
        "global_valid_toks": float(sum(len(pair.chosen_answer) + len(pair.rejected_answer) for pair in valid)),
    }
