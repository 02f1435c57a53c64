"""The server of `nemotron ui`: pages and data over HTTP on loopback, read-only, for whoever has the token."""

from __future__ import annotations

import errno
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from nemotron_launch.errors import UserError
from nemotron_launch.jobs.run import Run
from nemotron_launch.ui import pages, run_view
from nemotron_launch.ui.access import HEADERS, REPORT_POLICY, Gate, new_gate
from nemotron_launch.ui.places import Places, Watched
from nemotron_launch.ui.rows import Rows

PORT = 8260
_NEXT = 20  # ports behind it that are tried, where nobody asked for one
# Seconds that an answer waits for what is read of a run the first time: a page, which then asks; what it asks; a report
# to keep.
_PAGE, _FIRST, _SAVED = 0.3, 5.0, 60.0
_PAGES = ("/", "/run", "/report")
_MOST_RUNS = 120  # of one comparison
Query = Mapping[str, list[str]]


class Problem(Exception):
    """What is answered instead of a page. status: of HTTP."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


class Server(ThreadingHTTPServer):
    """The server and what it knows. `gate.address` opens it; `close` ends it with its threads."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, port: int, gate: Callable[[int], Gate] = new_gate) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.gate = gate(self.server_address[1])
        self.ended = False
        self.rows = Rows()
        self.places = Places(self.rows)

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks the name service what this machine is called.
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is nothing to tell."""

    def close(self) -> None:
        self.ended = True  # for the connections that are open
        self.places.end()
        self.server_close()


def open_server(port: int | None) -> Server:
    """A server on this port; None: on the first free one from PORT on. UserError: the port is taken."""
    for candidate in [port] if port is not None else range(PORT, PORT + _NEXT):
        try:
            return Server(candidate)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise UserError(f"cannot listen on 127.0.0.1: {error.strerror}", exit_code=1) from None
            why = "is taken" if error.errno == errno.EADDRINUSE else "is not ours to use"
    if port is not None:
        hint = "another:  --port N;  without it the next free one is taken"
        raise UserError(f"port {port} {why}", where="--port", hint=hint, exit_code=1) from None
    raise UserError(f"ports {PORT} to {PORT + _NEXT - 1} are taken", hint="--port 0 takes any free one", exit_code=1)


def serve(server: Server) -> threading.Thread:
    """Serve in a thread of its own."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True, name="ui")
    thread.start()
    return thread


class Handler(BaseHTTPRequestHandler):
    """One connection. GET and HEAD only; everything but a refusal needs the token."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version = "nemotron"
    sys_version = ""
    timeout = 60

    def do_GET(self) -> None:
        if self.server.ended:
            self.close_connection = True
            return
        try:
            self._answer()
        except Problem as problem:
            self._refuse(problem)
        except UserError as error:
            self._refuse(Problem(500, str(error).removeprefix("error: ")))

    do_HEAD = do_GET

    def _answer(self) -> None:
        gate = self.server.gate
        if not gate.knows_host(self.headers.get("Host", "")):
            raise Problem(421, f"This is {gate.address.partition('?')[0]} and no other host.")
        if gate.from_elsewhere(self.headers):  # type: ignore[arg-type]
            raise Problem(403, "Another site's page may not read this.")
        place = urlsplit(self.path)
        query = parse_qs(place.query, keep_blank_values=True, max_num_fields=200)
        if gate.opens(query.get("token", [""])[0]):
            return self._let_in(place.path, query)
        if not gate.has_cookie(self.headers.get("Cookie", "")):
            raise Problem(403, "Open the whole address that `nemotron ui` printed: it ends with a token.")
        answer = _ROUTES.get(place.path)
        if answer is not None:
            return self._send_json(answer(self.server, query))
        if place.path.startswith("/assets/"):
            return self._send_asset(place.path.removeprefix("/assets/"))
        if place.path == "/report":
            return self._send_report(query)
        return self._send(200, pages.HTML, self._page(place.path, query).encode())

    def _page(self, path: str, query: Query) -> str:
        if path == "/":
            return pages.list_page(_runs(self.server, {}))
        if path == "/run":
            return pages.run_page(_named(query), _report(self.server, query, patience=_PAGE))
        raise Problem(404, "There is no such page.")

    def _send_asset(self, name: str) -> None:
        try:
            kind, data = pages.asset(name)
        except KeyError:
            raise Problem(404, "There is no such file.") from None
        self._send(200, kind, data)

    def _send_report(self, query: Query) -> None:
        """The page that `jobs report` writes, which brings its own policy; save: as a file to keep."""
        text = pages.report_page(_report(self.server, query, patience=_SAVED))
        more = {"Content-Security-Policy": REPORT_POLICY}
        if "save" in query:
            name = re.sub(r"[^\w.-]", "_", _named(query)[0])
            more["Content-Disposition"] = f'attachment; filename="{name}.html"'
        self._send(200, pages.HTML, text.encode(), headers=more)

    def _let_in(self, path: str, query: Query) -> None:
        """Put the token into a cookie, and the address without it into the browser's history."""
        left = [(name, value) for name, values in query.items() if name != "token" for value in values]
        self.send_response(303)
        self.send_header("Set-Cookie", self.server.gate.set_cookie())
        self.send_header("Location", (path if path in _PAGES else "/") + (f"?{urlencode(left)}" if left else ""))
        self._end(b"")

    def _refuse(self, problem: Problem) -> None:
        if urlsplit(self.path).path.startswith("/api/"):
            return self._send_json({"error": problem.text}, status=problem.status)
        policy = {"Content-Security-Policy": pages.PROBLEM_POLICY}
        return self._send(problem.status, pages.HTML, pages.problem_page(problem.text).encode(), headers=policy)

    def _send_json(self, data: Any, status: int = 200) -> None:
        text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=str)
        self._send(status, "application/json; charset=utf-8", text.encode("utf-8", "replace"))

    def _send(self, status: int, kind: str, data: bytes, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self._end(data, headers)

    def _end(self, data: bytes, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        for name, value in {**HEADERS, **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses by itself: other methods, requests that are none."""
        text = "Only GET: nothing can be changed here." if code == 501 else message or "That is no request."
        self.close_connection = True
        self.send_response(405 if code == 501 else code)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Connection", "close")
        self._end(f"{text}\n".encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is the user's."""


# The data of pages ----------------------------------------------------------------------------------------------------


def _runs(server: Server, query: Query) -> Any:
    """The list, or what has changed in it."""
    found = server.rows.since(_number(query, "since"))
    server.places.ask_list()
    return {**found, "away": [text for text in server.places.problems() if text != found["problem"]]}


def _report(server: Server, query: Query, *, patience: float = _FIRST) -> Any:
    return run_view.whole(_watched(server, query, patience=patience), patience=patience)


def _news(server: Server, query: Query) -> Any:
    """What has come since, of each run: null where all of it must be told again."""
    watched = _watched(server, query)
    marks, steps = query.get("mark", []), query.get("step", [])
    if not len(watched) == len(marks) == len(steps):
        return {"runs": {}}
    try:
        return {
            "runs": {
                one.run.run_id: run_view.news(one, mark, int(step))
                for one, mark, step in zip(watched, marks, steps, strict=True)
            }
        }
    except ValueError:
        raise Problem(400, "step is no number.") from None


def _logs(server: Server, query: Query) -> Any:
    wanted = query.get("source", [""])[0]
    watched = _watched(server, query, log=wanted)[0]
    return run_view.logs(watched, wanted, _number(query, "from") if "from" in query else None)


_ROUTES: Mapping[str, Callable[[Server, Query], Any]] = {
    "/api/runs": _runs,
    "/api/report": _report,
    "/api/news": _news,
    "/api/logs": _logs,
}


def _named(query: Query) -> list[str]:
    names = query.get("run", [])
    if not names:
        raise Problem(404, "Which run? The address names none.")
    return names


def _watched(server: Server, query: Query, *, log: str | None = None, patience: float = _FIRST) -> Sequence[Watched]:
    watched = [server.places.of(run).watch(run, log) for run in _chosen(server, _named(query))]
    end = time.monotonic() + patience
    for one in watched:
        (one.has_files if log is None else one.has_logs).wait(max(0.0, end - time.monotonic()))
    return watched


def _chosen(server: Server, names: Sequence[str]) -> list[Run]:
    """Runs by their ids, a sweep as its points, each once."""
    found: dict[str, Run] = {}
    for name in names:
        run = server.rows.get(name)
        points = [run] if run else server.rows.points(name)
        if not points:
            if server.rows.problem:
                raise Problem(500, server.rows.problem)
            raise Problem(404, f"There is no run {name}: it may have been pruned. What it made stays where it was.")
        found |= {one.run_id: one for one in points}
    if len(found) > _MOST_RUNS:
        raise Problem(400, f"{len(found)} runs are too many to look at together: tick up to {_MOST_RUNS} of them.")
    return list(found.values())


def _number(query: Query, name: str) -> int:
    try:
        return int(query.get(name, ["0"])[0])
    except ValueError:
        raise Problem(400, f"{name} is no number.") from None
