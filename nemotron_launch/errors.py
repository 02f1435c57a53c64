"""The one exception that a user can cause; raised where it is known, printed in one place. Anyone may import this."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave, said in one message.

    message: what is wrong. where: a file and line, or a config key. hint: what to do about it (may have several lines).
    exit_code: 2 for usage and bad input, 1 for what went wrong outside the user's input.
    """

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None, exit_code: int = 2) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint
        self.exit_code = exit_code

    def __str__(self) -> str:
        """The text that a terminal shows: `error: where: message`, the hint's lines indented below it."""
        head = f"error: {self.where}: {self.message}" if self.where else f"error: {self.message}"
        return "\n       ".join([head, *(self.hint or "").splitlines()])
