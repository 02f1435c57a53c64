"""The server of `nemotron ui` in this process, and a browser in front of it."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemotron_launch.ui.server import Server, open_server, serve
from tests.browser import browser

__all__ = ["browser"]


class Pages:
    """A server, and requests to it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.port = server.gate.port
        self.base = f"http://127.0.0.1:{self.port}"
        self.address = server.gate.address

    def ask(
        self, path: str, *, method: str = "GET", token: str | None = None, **headers: str
    ) -> tuple[int, dict[str, str], str]:
        """Status, headers and text of an answer. The token comes as the cookie; an empty one is left out."""
        cookie = self.server.gate.token if token is None else token
        sent = {
            "Host": f"127.0.0.1:{self.port}",
            **({"Cookie": f"{self.server.gate.cookie}={cookie}"} if cookie else {}),
        }
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.putrequest(method, path, skip_host=True)
            for name, value in sent.items():
                connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read().decode()
        finally:
            connection.close()

    def json(self, path: str) -> Any:
        status, _, text = self.ask(path)
        assert status == 200, text
        return json.loads(text)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty ledger."""
    monkeypatch.setenv("NEMOTRON_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def pages(state: Path) -> Iterator[Pages]:
    server = open_server(0)
    thread = serve(server)
    yield Pages(server)
    server.shutdown()
    thread.join()
    server.close()
