"""A stand-in for NeMo Gym on loopback: a head server and resource servers with its wire format, well or ill."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What pydantic asks of a request to /verify (nemo-gym 0.4.0, openai 1.x): anything missing is answered with 422.
RESPONSE_FIELDS = ("id", "created_at", "model", "object", "output", "parallel_tool_calls", "tool_choice", "tools")


class Gym:
    """Servers that run until `close`. behave: for an instance, what its /verify does: returns (status, body) or raises.

    Every instance checks the wire format first, and that /seed_session was visited with the same cookie.
    """

    def __init__(self, behave: dict[str, Callable[[dict[str, Any]], tuple[int, Any]]], *, late: float = 0.0) -> None:
        self.visits: list[tuple[str, str, dict[str, Any]]] = []
        self.most_at_once = 0
        self.released = threading.Event()
        self._at_once = 0
        self._lock = threading.Lock()
        self._servers: list[ThreadingHTTPServer] = []
        config: dict[str, Any] = {"head_server": {"host": "127.0.0.1", "port": 0}, "policy_api_key": "none"}
        for name, verify in behave.items():
            port = self._start(name, verify)
            block = {"entrypoint": "app.py", "host": "127.0.0.1", "port": port}
            config[name] = {"resources_servers": {name: block}}
            agent = {"entrypoint": "app.py", "resources_server": {"type": "resources_servers", "name": name}}
            config[f"{name}_simple_agent"] = {"responses_api_agents": {"simple_agent": agent}}
        self.config = config
        self.address = f"http://127.0.0.1:{self._start_head()}"

    def close(self) -> None:
        self.released.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def stop(self, name: str) -> None:
        """End a server: its port then refuses connections, and those that there are break."""
        server = next(server for server in self._servers if getattr(server, "instance", "") == name)
        self._servers.remove(server)
        server.dead = True  # type: ignore[attr-defined]
        server.shutdown()
        server.server_close()

    def _start_head(self) -> int:
        gym = self

        class Head(_Quiet):
            def do_GET(self) -> None:
                self.reply(200, json.dumps(gym.config))  # YAML as a JSON string, as FastAPI sends it

        return self._serve(Head, "head")

    def _start(self, name: str, verify: Callable[[dict[str, Any]], tuple[int, Any]]) -> int:
        gym = self

        class Resources(_Quiet):
            def do_GET(self) -> None:
                self.reply(200, {"status": "ok"})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with gym._lock:
                    gym.visits.append((name, self.path, body))
                    number = len(gym.visits)
                    gym._at_once += 1
                    gym.most_at_once = max(gym.most_at_once, gym._at_once)
                try:
                    if self.path == "/seed_session":
                        self.reply(200, {}, cookie=f"session={number}; path=/; httponly")
                    elif self.path == "/verify":
                        self.reply(*(_refused(body, self.headers.get("Cookie", "")) or verify(body)))
                    else:
                        self.reply(404, {})
                except (ConnectionError, OSError):
                    self.close_connection = True  # without an answer
                finally:
                    with gym._lock:
                        gym._at_once -= 1

        return self._serve(Resources, name)

    def _serve(self, handler: type[BaseHTTPRequestHandler], name: str) -> int:
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        server.instance, server.dead = name, False  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self._servers.append(server)
        return int(server.server_address[1])


class _Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, body: Any, *, cookie: str = "") -> None:
        if self.server.dead:  # type: ignore[attr-defined]
            raise ConnectionResetError
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if cookie:
            self.send_header("Set-Cookie", cookie)
        self.end_headers()
        self.wfile.write(data)


def _refused(body: dict[str, Any], cookie: str) -> tuple[int, Any] | None:
    missing = [["body", key] for key in ("responses_create_params", "response", "expected_answer") if key not in body]
    response = body.get("response") or {}
    missing += [["body", "response", key] for key in RESPONSE_FIELDS if key not in response]
    for item in response.get("output", []):
        if item["type"] == "message":
            missing += [["body", "response", "output", key] for key in ("id", "status", "role") if key not in item]
            missing += [["body", "annotations"] for part in item["content"] if "annotations" not in part]
    if missing:
        return 422, {"detail": [{"loc": at, "msg": "Field required", "type": "missing"} for at in missing]}
    return None if cookie.startswith("session=") else (500, {"detail": "no session"})


def text_of(body: dict[str, Any]) -> str:
    """The text of a response's messages."""
    messages = [item for item in body["response"]["output"] if item["type"] == "message"]
    return "".join(part["text"] for message in messages for part in message["content"])


def right_or_wrong(body: dict[str, Any]) -> tuple[int, Any]:
    """A well server: 1 for the expected answer; the reply echoes the request."""
    return 200, {**body, "reward": float(text_of(body) == body["expected_answer"])}
