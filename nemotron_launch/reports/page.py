"""A page about runs that is one file: styles, scripts and data are in it, and nothing is fetched from anywhere."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"
STYLES = ("uplot-1.6.32.min.css", "report.css")
SCRIPTS = (
    "uplot-1.6.32.min.js",
    "report_dom.js",
    "report_charts.js",
    "report_sweep.js",
    "report_lineage.js",
    "report.js",
)
# What a JSON text may hold that would end a script element, or a line of JavaScript.
_ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def page(data: Mapping[str, Any], *, title: str = "", connect: str = "'none'") -> str:
    """The page for `run_data.report_data(...)`, whole. Only ASCII; the same data give the same bytes.

    Its Content-Security-Policy runs only the scripts that are in it and forbids every request. connect: what it allows
    instead, for a server that keeps the page fresh.
    """
    styles, scripts = [asset(name) for name in STYLES], [asset(name) for name in SCRIPTS]
    policy = content_security_policy(styles, scripts, connect=connect)
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{_text(title or _title(data))}</title>",
        *(f"<style>{text}</style>" for text in styles),
        "</head>",
        "<body>",
        '<div id="report"><noscript>This page draws its plots with JavaScript.</noscript></div>',
        f'<script type="application/json" id="data">{embedded(data)}</script>',
        *(f"<script>{text}</script>" for text in scripts),
        "</body>",
        "</html>",
        "",
    ]
    return "\n".join(parts)


def asset(name: str) -> str:
    """A style or script as it stands in the page."""
    text = (ASSETS / name).read_text(encoding="utf-8")
    if not text.isascii():  # hashes and bytes would depend on how a page is stored
        text = "".join(letter if letter.isascii() else _escaped(letter, name) for letter in text)
    return text.strip("\n")


def embedded(data: Any) -> str:
    """Data as JSON that stays within a script element whatever texts it holds."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for letter, escaped in _ESCAPED.items():
        text = text.replace(letter, escaped)
    return text


def content_security_policy(styles: Sequence[str], scripts: Sequence[str], *, connect: str = "'none'") -> str:
    """Only these very styles and scripts; nothing from elsewhere, and no request."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(_hash(text) for text in scripts)}",
            f"style-src {' '.join(_hash(text) for text in styles)}",
            f"connect-src {connect}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _escaped(letter: str, name: str) -> str:
    code = ord(letter)
    if name.endswith(".css"):
        return f"\\{code:x} "
    return f"\\u{code:04x}" if code < 0x10000 else f"\\u{{{code:x}}}"


def _title(data: Mapping[str, Any]) -> str:
    names = [str(run["name"]) for run in data["runs"]]
    return names[0] if len(names) == 1 else f"{len(names)} runs"


def _text(text: str) -> str:
    """Text between tags, every control character replaced."""
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return html.escape(shown).encode("ascii", "xmlcharrefreplace").decode()
