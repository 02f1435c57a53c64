"""NeMo Gym's servers: where they are, whether they are ready, and requests that a server's failure does not outlive."""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.cookiejar import CookieJar, DefaultCookiePolicy
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import urlsplit

import httpx
import yaml

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.servers import retry_after, server_address

KEY = "env.nemo_gym"
#: Seconds for the head server to answer at all; the launcher has waited for it, or it runs already.
_HEAD_TIMEOUT = 30.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
#: Failures in a row after which a server counts as down, and the seconds until it is tried again, doubled each time.
_FAILURES, _DOWN, _LONGEST_DOWN = 5, 15.0, 300.0
_LARGEST_REPLY = 64 * 2**20
_BUSY = frozenset({408, 425, 429, 503})
_LOOPBACK = ("127.0.0.1", "localhost", "0.0.0.0", "::1", None)


class Failed(Exception):
    """Why a request brought nothing. final: another try would bring the same."""

    def __init__(self, message: str, *, final: bool = False, busy: float | None = None) -> None:
        super().__init__(message)
        self.final = final
        self.busy = busy


@dataclass(eq=False)
class Server:
    """One resource server. limit: requests that it gets at once, fewer while it says that it is busy."""

    name: str
    url: str
    most: int
    limit: float = 0.0
    busy: int = 0
    failures: int = 0
    down_until: float = 0.0
    down_for: float = _DOWN
    trying: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self.limit = float(self.most)

    @contextmanager
    def place(self, stop: threading.Event) -> Iterator[None]:
        """A place among its requests, waited for. Raises Failed at once while the server counts as down."""
        with self.changed:
            while True:
                if stop.is_set():
                    raise Failed("stopped", final=True)
                if self.failures >= _FAILURES and (self.trying or time.monotonic() < self.down_until):
                    raise Failed(f"{self.name} is down", final=True)
                if self.busy < int(self.limit):
                    break
                self.changed.wait(1.0)
            self.busy += 1
            self.trying = self.failures >= _FAILURES
        try:
            yield
        finally:
            with self.changed:
                self.busy -= 1
                self.trying = False
                self.changed.notify_all()

    def answered(self) -> None:
        """A request was answered: the server is well, and may get more."""
        with self.changed:
            self.failures, self.down_for = 0, _DOWN
            self.limit = min(float(self.most), self.limit + 1 / max(1.0, self.limit))

    def refused(self) -> None:
        """The server is busy: it gets half as many."""
        with self.changed:
            self.limit = max(1.0, self.limit / 2)

    def failed(self) -> None:
        """A request failed; too many in a row, and the server counts as down for a while."""
        with self.changed:
            self.failures += 1
            if self.failures >= _FAILURES and time.monotonic() >= self.down_until:
                self.down_until = time.monotonic() + self.down_for
                self.down_for = min(2 * self.down_for, _LONGEST_DOWN)


class Servers:
    """All servers of a section `env.nemo_gym`, asked from several threads."""

    def __init__(self, section: Mapping[str, Any]) -> None:
        self._section = section
        self._head = server_address(section["server"], where=f"{KEY}.server") if section["server"] else None
        self._stop = threading.Event()
        self._servers: dict[str, Server] = {}
        self._agents: dict[str, str] = {}
        self._http = httpx.Client(
            timeout=httpx.Timeout(section["timeout"], connect=10.0, pool=None),
            limits=httpx.Limits(max_connections=section["concurrency"], max_keepalive_connections=20),
            trust_env=False,  # a proxy for the hub is none for a server next door
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # a session's cookie is that session's alone
        )
        self._learn({name: block for name, block in section.items() if isinstance(block, Mapping)}, None)

    def find(self, agent: str) -> Server | None:
        """The resource server that verifies for an agent, named by the agent or by itself."""
        names = (self._agents.get(agent), agent, agent.removesuffix("_simple_agent"), agent.removesuffix("_agent"))
        return next((self._servers[name] for name in names if name in self._servers), None)

    def names(self) -> list[str]:
        """What a row may call an agent."""
        return sorted({*self._agents, *self._servers})

    def await_ready(self, agents: Sequence[str]) -> None:
        """Wait until the agents' servers answer. Raises UserError.

        The head server is there before the others: it starts them, and knows an agent from the beginning.
        """
        begin = last_said = time.monotonic()
        while True:
            waiting = self._not_ready(agents, time.monotonic() - begin)
            if not waiting:
                return
            now = time.monotonic()
            if now - begin > self._section["ready_timeout"]:
                raise UserError(
                    f"{', '.join(waiting)} did not get ready in {self._section['ready_timeout']:g} s",
                    where=f"{KEY}.config_paths",
                    hint=f"see the servers' log (logs/attempt-*/<service>-*.log), or raise {KEY}.ready_timeout",
                    exit_code=1,
                )
            if now - last_said > 30:
                print(f"waiting for NeMo Gym: {', '.join(waiting)}", file=sys.stderr, flush=True)
                last_said = now
            time.sleep(min(1.0, 0.05 + (now - begin) / 10))

    def ask(self, server: Server, visit: Callable[[Callable[[str, Any], Any]], Any], seed: str) -> Any:
        """What a visit of a server returns: `visit(post)`, where post(path, body) is the reply; cookies are kept.

        Tried again with growing pauses when the server fails, is busy or answers nonsense. Raises Failed.
        """
        chance = random.Random(seed)
        pause = _FIRST_PAUSE
        for left in reversed(range(self._section["retries"] + 1)):
            try:
                with server.place(self._stop):
                    answer = visit(_Session(self._http, server.url, self._section["timeout"]).post)
                server.answered()
                return answer
            except Failed as problem:
                if problem.busy is not None:
                    server.refused()
                elif problem.final:
                    raise
                else:
                    server.failed()
                if not left:
                    raise
                wait = max(pause * (0.5 + chance.random()), min(problem.busy or 0.0, _LONGEST_PAUSE))
            if self._stop.wait(wait):
                raise Failed("stopped", final=True)
            pause = min(2 * pause, _LONGEST_PAUSE)
        raise AssertionError("unreachable")

    def stop(self) -> None:
        """Let every request that waits or is tried again end at once."""
        self._stop.set()

    def go_on(self) -> None:
        """Allow requests again."""
        self._stop.clear()

    def close(self) -> None:
        self.stop()
        self._http.close()

    def _not_ready(self, agents: Sequence[str], waited: float) -> list[str]:
        unknown = any(self.find(agent) is None for agent in agents)
        if unknown and self._head is not None and not self._ask_head(waited):
            return ["the head server"]
        found = {agent: self.find(agent) for agent in agents}
        waiting = [agent for agent, server in found.items() if server is None and agent in self._agents]
        for server in {server.name: server for server in found.values() if server}.values():
            try:
                with self._http.stream("GET", server.url, timeout=10.0):
                    pass  # whatever it answers, it is there
            except httpx.HTTPError:
                waiting.append(server.name)
        return waiting

    def _ask_head(self, waited: float) -> bool:
        """Learn the servers' places from the head server; False while it does not answer yet. Raises UserError."""
        try:
            with self._http.stream("GET", f"{self._head}/global_config_dict_yaml", timeout=10.0) as reply:
                reply.raise_for_status()
                known = yaml.safe_load(_body(reply, 10.0))
            known = yaml.safe_load(known) if isinstance(known, str) else known  # FastAPI sends the text as JSON
            if not isinstance(known, Mapping):
                raise ValueError("what it says of its servers is no mapping")
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, yaml.YAMLError, Failed) as error:
            patience = min(_HEAD_TIMEOUT, self._section["ready_timeout"] / 2)
            if waited < patience and isinstance(error, httpx.TransportError):
                return False
            raise UserError(
                f"NeMo Gym's head server at {self._head} is not ready: {_plain(error)}",
                where=f"{KEY}.server",
                hint="name a service of run.services that starts it (ng_run), or the address of one that runs",
                exit_code=1,
            ) from error
        self._learn(known, urlsplit(self._head or "").hostname)
        return True

    def _learn(self, config: Mapping[str, Any], host: str | None) -> None:
        """Instances of a NeMo Gym config: resource servers with their ports, agents with their resource server.

        host: where the head server is; what it calls loopback is there too.
        """
        for instance, block in config.items():
            if not isinstance(block, Mapping):
                continue
            for server in _mappings(block.get("resources_servers")):
                port, at = server.get("port"), server.get("host")
                if isinstance(port, int) and instance not in self._servers:
                    at = (host or "127.0.0.1") if at in _LOOPBACK else at
                    self._servers[instance] = Server(instance, f"http://{at}:{port}", self._section["concurrency"])
            for agent in _mappings(block.get("responses_api_agents")):
                named = agent.get("resources_server")
                if isinstance(named, Mapping) and isinstance(named.get("name"), str):
                    self._agents[instance] = named["name"]


class _Session:
    """One rollout's requests to a server, with the cookies that it sets."""

    def __init__(self, http: httpx.Client, url: str, timeout: float) -> None:
        self._http = http
        self._url = url
        self._timeout = timeout
        self._cookies: dict[str, str] = {}

    def post(self, path: str, body: Any) -> Any:
        """The reply to a POST. Raises Failed."""
        headers = {"Content-Type": "application/json"}
        if self._cookies:
            headers["Cookie"] = "; ".join(f"{name}={value}" for name, value in self._cookies.items())
        try:
            content = json.dumps(body, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise Failed(f"the row is no JSON ({error})", final=True) from error
        try:
            with self._http.stream("POST", self._url + path, content=content, headers=headers) as reply:
                said = _body(reply, self._timeout)
                self._keep_cookies(reply)
        except Failed as problem:
            raise Failed(f"{path} {problem}") from problem
        except httpx.TimeoutException as error:
            raise Failed(f"{path} took longer than {self._timeout:g} s") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Failed(f"{path}: {_plain(error)}") from error
        if reply.status_code in _BUSY:
            raise Failed(f"{path} answers {reply.status_code}", busy=retry_after(reply))
        if reply.status_code == 404 and path == "/seed_session":
            return None
        if reply.status_code >= 300:
            what = _detail(said) if reply.status_code == 422 else ""
            raise Failed(f"{path} answers {reply.status_code}{what}", final=reply.status_code < 500)
        try:
            return json.loads(said)
        except (ValueError, RecursionError) as error:
            raise Failed(f"{path} answers with no JSON") from error

    def _keep_cookies(self, reply: httpx.Response) -> None:
        for line in reply.headers.get_list("set-cookie"):
            try:
                cookie: SimpleCookie = SimpleCookie(line)
            except CookieError:
                continue
            self._cookies |= {name: morsel.coded_value for name, morsel in cookie.items()}


def _body(reply: httpx.Response, seconds: float) -> bytes:
    """All of a reply; one that comes in drops has the same time as any other. Raises Failed."""
    deadline, said = time.monotonic() + seconds, bytearray()
    for chunk in reply.iter_bytes():
        said += chunk
        if len(said) > _LARGEST_REPLY:
            raise Failed(f"answers with more than {_LARGEST_REPLY >> 20} MiB")
        if time.monotonic() > deadline:
            raise Failed(f"took longer than {seconds:g} s")
    return bytes(said)


def _mappings(block: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(block, Mapping):
        yield from (inner for inner in block.values() if isinstance(inner, Mapping))


def _detail(said: bytes) -> str:
    """FastAPI's account of a request that it cannot read: which fields, and why."""
    try:
        details = json.loads(said)["detail"]
        told = [f"{'.'.join(str(part) for part in one['loc'][1:])}: {one['msg']}" for one in details[:3]]
    except (ValueError, KeyError, TypeError):
        return ""
    return f" ({'; '.join(told)})" if told else ""


def _plain(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
