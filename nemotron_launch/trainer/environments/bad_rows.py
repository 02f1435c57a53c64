"""Rows that cannot be scored, said in one message: how many, why, and where the first of them are."""

from __future__ import annotations

from collections.abc import Sequence

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.data.sources import BadRows


def refuse_bad_rows(problems: Sequence[str], wheres: Sequence[str], *, allowed: float = 0.0) -> None:
    """Raise UserError if more than a share `allowed` of the rows have a problem. wheres: file:line of each row."""
    bad = BadRows()
    for problem, where in zip(problems, wheres, strict=True):
        if problem:
            bad.add(problem, where)
    if bad.bad > allowed * len(problems):
        first = next(i for i, problem in enumerate(problems) if problem)
        raise UserError(
            f"{bad.bad} of {len(problems)} rows cannot be scored: {problems[first]}",
            where=wheres[first],
            hint="\n".join([*bad.lines(), "correct these rows, or allow a larger share with data.max_bad_rows"]),
        )
