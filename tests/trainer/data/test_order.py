"""The order of batches: each row once an epoch, and nothing but seed and position decides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.data.order import Position, batch_indices, next_position, steps_per_epoch

SIZES = st.tuples(st.integers(1, 200), st.integers(1, 50)).filter(lambda sizes: sizes[1] <= sizes[0])


def epoch_of(
    n: int, batch: int, *, epoch: int = 0, seed: int = 42, shuffle: bool = True, drop_last: bool = False
) -> list[list[int]]:
    return [
        batch_indices(
            n, seed=seed, epoch=epoch, step_in_epoch=step, batch=batch, shuffle=shuffle, drop_last=drop_last
        ).tolist()
        for step in range(steps_per_epoch(n, batch, drop_last=drop_last))
    ]


@settings(deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 2**32), epoch=st.integers(0, 1000), shuffle=st.booleans())
def test_every_row_comes_once_an_epoch(sizes: tuple[int, int], seed: int, epoch: int, shuffle: bool) -> None:
    n, batch = sizes
    batches = epoch_of(n, batch, epoch=epoch, seed=seed, shuffle=shuffle)
    assert sorted(sum(batches, [])) == list(range(n))
    assert {len(one) for one in batches[:-1]} <= {batch}


@settings(deadline=None)
@given(sizes=SIZES)
def test_dropped_rest_is_less_than_a_batch(sizes: tuple[int, int]) -> None:
    n, batch = sizes
    seen: list[int] = sum(epoch_of(n, batch, drop_last=True), [])
    assert len(seen) == len(set(seen)) == n - n % batch


@settings(deadline=None)
@given(sizes=SIZES, steps=st.integers(0, 40), drop_last=st.booleans())
def test_resuming_continues_the_order(sizes: tuple[int, int], steps: int, drop_last: bool) -> None:
    n, batch = sizes
    whole = sum((epoch_of(n, batch, epoch=e, drop_last=drop_last) for e in range(42)), [])
    position = Position()
    for _ in range(steps):
        position = next_position(position, n, batch, drop_last=drop_last)
    position = Position.from_dict(position.to_dict())
    got = batch_indices(
        n, seed=42, epoch=position.epoch, step_in_epoch=position.step_in_epoch, batch=batch, shuffle=True,
        drop_last=drop_last,
    )  # fmt: skip
    assert got.tolist() == whole[steps]


def test_end_of_an_epoch_is_the_next_ones_beginning() -> None:
    assert next_position(Position(0, 1), 8, 4, drop_last=True) == Position(1, 0)
    assert next_position(Position(0, 1), 9, 4, drop_last=False) == Position(0, 2)


def test_epochs_and_seeds_differ() -> None:
    assert epoch_of(100, 10) != epoch_of(100, 10, epoch=1)
    assert epoch_of(100, 10) != epoch_of(100, 10, seed=43)


def test_order_is_the_same_on_every_machine() -> None:
    # Recorded here; resuming elsewhere relies on it.
    assert epoch_of(8, 8, seed=42)[0] == [0, 1, 4, 2, 6, 5, 7, 3]
    assert epoch_of(8, 8, shuffle=False)[0] == list(range(8))


def test_indices_cannot_be_spoiled_for_others() -> None:
    first = batch_indices(8, seed=0, epoch=0, step_in_epoch=0, batch=4, shuffle=True, drop_last=True)
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1
    assert first.dtype == np.int64


def test_fewer_rows_than_a_batch_are_refused() -> None:
    with pytest.raises(UserError, match="7 rows do not fill one batch of 8"):
        steps_per_epoch(7, 8, drop_last=True)
    assert steps_per_epoch(7, 8, drop_last=False) == 1


def test_no_batch_lies_beyond_the_epoch() -> None:
    with pytest.raises(IndexError):
        batch_indices(8, seed=0, epoch=0, step_in_epoch=2, batch=4, shuffle=True, drop_last=True)
