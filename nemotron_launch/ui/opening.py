"""Opens the pages in the user's browser, without the token in a command line that others of the machine can read."""

from __future__ import annotations

import html
import os
import sys
import webbrowser
from contextlib import suppress
from pathlib import Path

FILE = "ui.html"


def open_browser(address: str, folder: Path) -> bool:
    """Open a file of the user's own that leads there; False where there is no browser that has a window."""
    if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or sys.platform == "darwin"):
        return False
    file = folder / FILE
    text = f'<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url={html.escape(address)}">'
    with suppress(OSError, webbrowser.Error):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        file.touch(mode=0o600)
        file.write_text(f'{text}<a href="{html.escape(address)}">nemotron ui</a>\n')
        return webbrowser.open(file.as_uri())
    return False
