"""Servers beside the trainer: judge, NeMo Gym, vLLM. Where they are, and what they ask of their clients."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nemotron_launch.errors import UserError

if TYPE_CHECKING:
    import httpx


def server_address(named: str, *, where: str) -> str:
    """http://host:port of a service of the run, which the environment tells, or the address as it is given."""
    if named.startswith(("http://", "https://")):
        return named.rstrip("/").removesuffix("/v1")
    variable = "NEMOTRON_SERVICE_" + "".join(c if c.isalnum() else "_" for c in named.upper())
    place = os.environ.get(variable)
    if not place:
        raise UserError(
            f"there is no service {named}: {variable} is not set",
            where=where,
            hint=f"list it under run.services, or give the address of one that runs (http://…) as {where}",
        )
    return f"http://{place}"


def retry_after(reply: httpx.Response) -> float:
    """Seconds that a server asks to be left alone; a date counts as nothing."""
    try:
        return max(0.0, float(reply.headers.get("retry-after", 0)))
    except ValueError:
        return 0.0
