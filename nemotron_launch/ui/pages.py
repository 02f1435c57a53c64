"""The pages: their frames, with the first data in them, and the files that they load."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from nemotron_launch.reports import page as report

HTML = "text/html; charset=utf-8"
_ASSETS = Path(__file__).parent / "assets"
_KINDS = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
_OWN = ("app.css", "theme.js", "common.js", "list.js", "logs.js", "run.js", "icon.svg")
_REPORT = (*report.STYLES, *report.SCRIPTS)

_PLAIN = (
    "body{font:16px/1.55 system-ui,sans-serif;margin:16vh auto;max-width:36rem;padding:0 1.2rem;white-space:pre-line;"
    "overflow-wrap:anywhere;background:Canvas;color:CanvasText}h1{font-size:1.1rem}a{color:inherit}"
)
PROBLEM_POLICY = report.content_security_policy([_PLAIN], []) + "; frame-ancestors 'none'"


@cache
def asset(name: str) -> tuple[str, bytes]:
    """A file that pages load, with its kind. Only these names are known; KeyError of others is the caller's 404."""
    if name in _OWN:
        return _KINDS[Path(name).suffix], (_ASSETS / name).read_bytes()
    if name in _REPORT:
        return _KINDS[Path(name).suffix], report.asset(name).encode()
    raise KeyError(name)


def list_page(data: Any) -> str:
    return _frame("Runs", data, styles=("report.css", "app.css"), scripts=("report_dom.js", "common.js", "list.js"))


def run_page(names: Sequence[str], data: Any) -> str:
    title = names[0] if len(names) == 1 else f"{len(names)} runs"
    scripts = (*report.SCRIPTS, "common.js", "logs.js", "run.js")
    return _frame(title, data, styles=(*report.STYLES, "app.css"), scripts=scripts)


def problem_page(text: str) -> str:
    """A page that says one thing. It loads nothing, for who sees it may have no right to more."""
    body = f'<main><h1>nemotron</h1><p>{html.escape(text)}</p><p><a href="/">All runs</a></p></main>'
    return _document("nemotron", body, f"<style>{_PLAIN}</style>")


def _frame(title: str, data: Any, *, styles: Sequence[str], scripts: Sequence[str]) -> str:
    head = [
        *(f'<link rel="stylesheet" href="/assets/{name}">' for name in styles),
        '<link rel="icon" href="/assets/icon.svg"><script src="/assets/theme.js"></script>',
        *(f'<script defer src="/assets/{name}"></script>' for name in scripts),
    ]
    body = (
        '<a class="skip" href="#main">Skip to the runs</a><div id="app"><main id="main"></main></div>'
        "<noscript>These pages need JavaScript.</noscript>"
        f'<script type="application/json" id="first">{report.embedded(data)}</script>'
    )
    return _document(f"{title} · nemotron", body, "".join(head))


def _document(title: str, body: str, head: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{html.escape(title)}</title>{head}</head>'
        f"<body>{body}</body></html>"
    )


def report_page(data: Mapping[str, Any]) -> str:
    """The page that `jobs report` writes."""
    return report.page(data["report"])
