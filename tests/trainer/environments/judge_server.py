"""A stand-in for a judge's server: OpenAI's wire format over real HTTP, judgements by a function, faults on demand."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class JudgeServer:
    """judge: the prompt's text → the reply's. faults: taken one a request: a status, "hang", "cut" or "nonsense"."""

    address: str = ""
    model: str = "judge"
    judge: Callable[[str], str] = lambda prompt: '{"score": 1}'
    faults: list[Any] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)


@contextmanager
def judge_server(**given: Any) -> Iterator[JudgeServer]:
    server = JudgeServer(**given)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(200, {"object": "list", "data": [{"id": server.model, "object": "model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            server.bodies.append(body)
            server.keys.append(self.headers.get("authorization"))
            fault = server.faults.pop(0) if server.faults else None
            if fault == "hang":
                server.released.wait(30)
            if fault in ("hang", "cut"):
                self.close_connection = True
                return
            if isinstance(fault, int):
                self._answer(fault, {"error": {"message": "as told"}})
                return
            if fault == "nonsense":
                self._answer(200, {"choices": []})
                return
            text = server.judge(body["messages"][0]["content"])
            message = {"role": "assistant", "content": text}
            self._answer(200, {"object": "chat.completion", "choices": [{"index": 0, "message": message}]})

        def _answer(self, status: int, data: dict[str, Any]) -> None:
            raw = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.address = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        http.shutdown()
        http.server_close()
