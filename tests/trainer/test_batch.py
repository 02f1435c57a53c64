"""Sequences cut and padded into rows, and the places in them whose output predicts a scored token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron_launch.trainer.batch import Batch, Group, collate, wanted_positions

PAD = 0


def group(prompt: int, *answers: int, valid: bool = True, first: int = 100) -> Group:
    """Tokens first, first + 1, …: the prompt's alike in all sequences, each answer's its own."""
    ids = []
    for k, answer in enumerate(answers):
        own = np.arange(answer) + first + 20 * (k + 1)
        ids.append(np.concatenate([np.arange(prompt) + first, own]))
    return Group(prompt, tuple(ids), valid)


def collated(groups: list[Group], **options: object) -> Batch:
    return collate(groups, pad_id=PAD, device=torch.device("cpu"), **options)  # type: ignore[arg-type]


def scored(batch: Batch) -> list[list[tuple[int, int]]]:
    """Per sequence: (id of the token at the place that predicts, id that it predicts), as the batch says."""
    places, index = wanted_positions(batch)
    flat = batch.tokens_BS.T.flatten()
    out: list[list[tuple[int, int]]] = [[] for _ in range(len(batch.tails_NR))]
    for place, i in zip(places.tolist(), index.tolist(), strict=True):
        out[i // batch.tail].append((int(flat[place]), int(batch.tails_NR.flatten()[i])))
    return out


def answers_of(groups: list[Group]) -> list[list[tuple[int, int]]]:
    """The same from the sequences themselves: each answer token with the token before it; none where nothing is."""
    out = []
    for one in groups:
        for k, ids in enumerate(one.ids):
            mask = one.loss_masks[k] if one.loss_masks else np.arange(len(ids)) >= one.prompt_len
            counted = [i for i in range(1, len(ids)) if mask[i] and one.valid]
            out.append([(int(ids[i - 1]), int(ids[i])) for i in counted])
    return out


def test_a_shared_prompt_stands_once_before_its_tails():
    batch = collated([group(2, 3, 1), group(4, 2, 2, first=200)])
    assert (batch.prompt, batch.tails, batch.tail, batch.rows) == (4, 2, 3, 2)
    assert batch.tokens_BS.tolist() == [
        [100, 101, PAD, PAD, 120, 121, 122, 140, PAD, PAD],
        [200, 201, 202, 203, 220, 221, PAD, 240, 241, PAD],
    ]
    assert batch.positions_BS.tolist() == [[0, 1, 2, 3, 2, 3, 4, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 4, 5, 6]]
    assert batch.mask_NR.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 0]]
    assert batch.prompt_lens_B.tolist() == [2, 4]
    assert batch.padded_prompts
    assert batch.longest == 6


def test_equal_prompts_need_no_mask():
    assert not collated([group(3, 1, 2), group(3, 2, 2)]).padded_prompts


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "groups",
    [
        [group(2, 3, 1), group(4, 2, 2, first=200)],
        [group(1, 1, 1)],
        [group(1, 3, 2), group(5, 1, 4, first=200)],
        [group(3, 2, 2, valid=False), group(2, 1, 3, first=200)],
        [group(3, 2, 2, valid=False)],
        [group(2, 1, 2, 3, 4)],
        [group(0, 4, 3)],
        [group(3, 4), group(1, 2, first=200)],
        [group(2, 0, 0)],
    ],
    ids=["pairs", "one-token", "one-token-prompt", "invalid", "none-valid", "four", "no-prompt", "single", "empty"],
)
def test_every_answer_token_is_predicted_by_the_token_before_it(groups, shared):
    assert scored(collated(groups, share_prompt=shared)) == answers_of(groups)


def test_masks_of_ones_own_choose_the_tokens():
    mask = np.array([0, 1, 0, 1, 1])
    one = Group(2, (np.arange(5) + 100,), loss_masks=(mask,))
    assert scored(collated([one])) == [[(100, 101), (102, 103), (103, 104)]]


def test_nothing_predicts_a_first_token():
    one = Group(0, (np.arange(3) + 100,), loss_masks=(np.ones(3),))
    assert scored(collated([one])) == [[(100, 101), (101, 102)]]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("multiple", [1, 2, 3, 8])
def test_rows_are_padded_to_a_multiple_and_score_the_same(shared, multiple):
    groups = [group(2, 3, 1), group(4, 2, 2, first=200)]
    batch = collated(groups, share_prompt=shared, multiple_of=multiple)
    assert batch.tokens_BS.shape[1] % multiple == 0
    assert batch.tokens_BS.shape[1] == batch.prompt + batch.tails * batch.tail
    assert scored(batch) == answers_of(groups)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5), st.booleans()), min_size=1, max_size=4),
    st.booleans(),
    st.integers(1, 5),
)
def test_any_groups_score_the_same_however_they_are_laid_out(shapes, shared, multiple):
    groups = [
        group(prompt, max(first, 1 - prompt), max(second, 1 - prompt), valid=valid, first=100 * (i + 1))
        for i, (prompt, first, second, valid) in enumerate(shapes)
    ]
    batch = collated(groups, share_prompt=shared, multiple_of=multiple)
    assert batch.tokens_BS.shape[1] % multiple == 0
    assert scored(batch) == answers_of(groups)
    assert int(batch.positions_BS.max()) == batch.longest
