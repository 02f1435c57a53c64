"""What one rank cannot do, all ranks give up together: no rank waits for one that has left, and one message is enough.

All ranks must call these at the same points, and what they call must use no collectives itself. It may raise UserError
or OSError; anything else is a defect of ours and leaves that rank alone with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.file_errors import file_error

T = TypeVar("T")


class SharedError(UserError):
    """A UserError that every rank raises at the same point; rank 0 prints it."""


def together(do: Callable[[], T]) -> T:
    """Call `do` on every rank; where it raises on any, all raise what the lowest of them did."""
    return _attempt(do)[0]


def on_rank_0(do: Callable[[], T]) -> T:
    """Call `do` on rank 0; all ranks return its result (it is pickled) or raise its error."""
    alone = not dist.is_initialized() or dist.get_rank() == 0
    _, results = _attempt(lambda: do() if alone else None, gather=True)
    result: T = results[0]
    return result


def same_everywhere(value: T, *, what: str, where: str | None = None) -> T:
    """`value`, where all ranks have the same; otherwise UserError: `rank 3 has <what> than rank 0`."""
    _, values = _attempt(lambda: value, gather=True)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise SharedError(
                f"rank {rank} has {what} than rank 0",
                where=where,
                hint="all machines must see the same files: use a shared file system",
            )
    return value


def _attempt(do: Callable[[], T], *, gather: bool = False) -> tuple[T, list[Any]]:
    """This rank's result, and, if asked for, that of all."""
    result, failure = None, None
    try:
        result = do()
    except UserError as error:
        failure = error
    except OSError as error:
        failure = file_error(error)
    said = (failure.message, failure.where, failure.hint, failure.exit_code) if failure else None
    mine = (said, result if gather else None)
    everyone = [mine]
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyone = [mine] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    for other, _ in everyone:
        if other is not None:
            message, where, hint, exit_code = other
            raise SharedError(message, where=where, hint=hint, exit_code=exit_code) from failure
    return result, [one for _, one in everyone]  # type: ignore[return-value]
