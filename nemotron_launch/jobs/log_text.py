"""Log lines for people who do not read them in a terminal of their own: plain text, and only the end of long logs."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence

from nemotron_launch.backends.live import Backend, LogSource
from nemotron_launch.errors import UserError

_LONGEST = 4000  # characters of a line
# Colours and movements of the cursor, titles of windows, character sets: all that a terminal would not print.
_ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]?|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]+[0-~]?|[0-~])|\x9b[0-?]*[ -/]*[@-~]?"
)


def clean(line: bytes) -> str:
    """A line as a terminal would leave it: what a progress bar overwrote and colours are gone, the rest is text."""
    text = line.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]
    if "\x1b" in text or "\x9b" in text:
        text = _ESCAPES.sub("", text)
    if not text.isprintable():
        text = "".join(one if one.isprintable() or one == "\t" else "\N{REPLACEMENT CHARACTER}" for one in text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text)} characters)"


def ends(backend: Backend, sources: Sequence[LogSource], before: int) -> dict[LogSource, int]:
    """Where to begin, in bytes, to read the last `before` bytes of logs; of those whose size nobody can tell, all."""
    host = backend.host
    sizes: dict[str, int] = {}
    for folder in {posixpath.dirname(one.key) for one in sources if posixpath.isabs(one.key)} if host else ():
        assert host is not None
        try:
            entries = host.entries(folder) or []
        except UserError:
            continue
        sizes |= {posixpath.join(folder, entry.name): entry.size for entry in entries}
    return {one: max(0, sizes.get(one.key, 0) - before) for one in sources}
