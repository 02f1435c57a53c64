"""The calls of Lepton's API that we use, over plain HTTP: typed, patient, and careful with the token.

What is safe to repeat is repeated: reads, stopping and deleting after any failure that may pass, creating a job only
where the service cannot have made it. Everything ends: each call has a deadline, a slow body too.
"""

from __future__ import annotations

import json
import random
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import httpx

from nemotron_launch import __version__
from nemotron_launch.backends.lepton_access import Access
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen
from nemotron_launch.hosts import Unreachable

EVERYTHING = "alive_and_archive"
_DEADLINE = 60.0  # seconds for one call and its body
_PATIENCE = 45.0  # seconds for all tries of a call
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 8.0  # seconds between tries, before jitter
_LARGEST = 256 << 20  # bytes of an answer
_PAGE = 100  # jobs that one listing asks for
_MOST_PAGES = 1000
_QUIET = 300.0  # seconds that a live log may say nothing before it is asked for anew
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


class Answer(UserError):
    """The service said no. status: of HTTP."""

    status = 0


class Uncertain(Unreachable):
    """A job may have been made or not: the answer got lost."""


@frozen
class Line:
    """A line of the log store. when: nanoseconds since 1970."""

    when: int
    text: str


class Api:
    """A workspace. Safe to use from several threads. retry_for: seconds for all tries of one call."""

    def __init__(self, access: Access, *, retry_for: float = _PATIENCE, deadline: float = _DEADLINE) -> None:
        self._access = access
        self._retry_for, self._deadline = retry_for, deadline
        self._closed = threading.Event()
        parts = urlsplit(access.url)
        self._place = (parts.scheme, parts.netloc)
        headers = {"Authorization": f"Bearer {access.token}", "User-Agent": f"nemotron-launch/{__version__}"}
        if access.origin:
            headers["origin"] = access.origin
        # Not trust_env: proxies and certificates are the user's to set, all else that a machine has lying about is not.
        self._http = httpx.Client(
            headers=headers,
            timeout=httpx.Timeout(30.0, connect=10.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=8),
            trust_env=False,
            proxy=_proxy(parts.scheme, parts.hostname or ""),
            verify=_certificates() if parts.scheme == "https" else False,
            follow_redirects=False,
            http2=False,
        )

    def __repr__(self) -> str:
        return f"Api({self._access.workspace!r}, {self._access.url!r})"

    def close(self) -> None:
        """End all that is under way, from whatever thread."""
        self._closed.set()
        self._http.close()

    # Jobs.

    def create_job(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """Make a job. Uncertain: it may have been made. Answer: it was not."""
        return _mapping(self._call("POST", "/jobs", json=spec), "POST /jobs")

    def job(self, job_id: str) -> dict[str, Any] | None:
        """A job, alive or archived; None where there is none."""
        try:
            found = self._call("GET", f"/jobs/{_id(job_id)}", params={"job_query_mode": EVERYTHING})
        except Answer as error:
            if error.status == 404:
                return None
            raise
        return _mapping(found, "GET /jobs/…")

    def jobs_named(self, name: str) -> list[dict[str, Any]]:
        """All jobs of exactly this name, alive or archived, the oldest first."""
        found: dict[str, dict[str, Any]] = {}
        for page in range(1, _MOST_PAGES):
            params = {"job_query_mode": EVERYTHING, "q": name, "page": page, "page_size": _PAGE}
            jobs = _items(self._call("GET", "/jobs", params=params), "jobs")
            new = [job for job in jobs if job_id(job) not in found]
            found |= {job_id(job): job for job in new}
            if not new or len(jobs) < _PAGE:  # a service that ignores `page` gives the same again
                break
        named = [job for job in found.values() if _metadata(job).get("name", job_id(job)) == name]
        return sorted(named, key=lambda job: (created(job), job_id(job)))

    def stop_job(self, job_id: str) -> None:
        """Stop a job. One that is gone is no error."""
        self._unless_gone("PATCH", job_id, json={"spec": {"stopped": True}})

    def delete_job(self, job_id: str) -> None:
        """Delete a job with what the service keeps of it. One that is gone is no error."""
        self._unless_gone("DELETE", job_id, params={"job_query_mode": EVERYTHING})

    def _unless_gone(self, method: str, job_id: str, **more: Any) -> None:
        try:
            self._call(method, f"/jobs/{_id(job_id)}", **more)
        except Answer as error:
            if error.status not in (404, 410):
                raise

    def events(self, job_id: str) -> list[dict[str, Any]]:
        return _items(self._call("GET", f"/jobs/{_id(job_id)}/events"), "events")

    def replicas(self, job_id: str) -> list[dict[str, Any]]:
        """Replicas of a job, those of earlier attempts too."""
        path = f"/jobs/{_id(job_id)}/replicas"
        return _items(self._call("GET", path, params={"job_query_mode": EVERYTHING}), "replicas")

    # Logs.

    @contextmanager
    def live_log(self, job_id: str, replica: str) -> Iterator[Iterator[bytes]]:
        """A replica's log from its beginning, in chunks as they come, until the service ends it. Not repeated."""
        path = f"/jobs/{_id(job_id)}/replicas/{_id(replica)}/log"
        timeout = httpx.Timeout(_QUIET, connect=10.0)
        with self._said(), self._http.stream("GET", self._access.url + path, timeout=timeout) as response:
            if response.status_code != 200:
                raise self._refusal("GET", path, response.status_code, _head(response))
            yield response.iter_bytes()

    def stored_log(self, job_id: str, replica: str, *, start: int, end: int, limit: int, forward: bool) -> list[Line]:
        """Lines of a replica from the log store with start <= when < end (nanoseconds), the first (last) `limit`.

        In the order of time.
        """
        params = {
            "job": job_id, "replica": replica, "start": start, "end": end, "limit": limit, "timestamps": True, "q": "",
            "direction": "forward" if forward else "backward", "job_query_mode": EVERYTHING,
        }  # fmt: skip
        answer = self._call("GET", "/logs", params=params)
        data = answer.get("data") if isinstance(answer, dict) else None
        streams = data.get("result") if isinstance(data, dict) else None
        lines: list[Line] = []
        for stream in streams or []:
            values = [Line(int(value[0]), str(value[1])) for value in stream.get("values") or []]
            first, last = (values[0].when, values[-1].when) if values else (0, 0)
            if first > last or (first == last and not forward):  # the last line first, also of one moment
                values.reverse()
            lines += values
        return sorted(lines, key=lambda line: line.when)

    # The workspace.

    def node_groups(self) -> list[dict[str, Any]]:
        return _items(self._call("GET", "/dedicated-node-groups"), "items")

    def shapes(self) -> list[dict[str, Any]]:
        return _items(self._call("GET", "/shapes"), "items")

    def secrets(self) -> list[str]:
        """The names of the workspace's secrets."""
        return sorted(str(item.get("name")) for item in _items(self._call("GET", "/usersecrets"), "items"))

    def workspace(self) -> dict[str, Any]:
        return _mapping(self._call("GET", "/workspace"), "GET /workspace")

    # One call.

    def _call(self, method: str, path: str, **more: Any) -> Any:
        end = time.monotonic() + self._retry_for
        tries = 0
        while True:
            tries += 1
            wait = None
            try:
                status, headers, body = self._once(method, path, **more)
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError) as error:
                failure: UserError = self._away(error)  # nothing was sent
            except (httpx.HTTPError, httpx.StreamError, TimeoutError) as error:
                if method == "POST":
                    raise Uncertain(f"{self._where}: {_reason(error)}", exit_code=1) from None
                failure = self._away(error)
            else:
                if status < 300:
                    try:
                        return json.loads(body) if body.strip() else None
                    except ValueError:
                        kind: type[Unreachable] = Uncertain if method == "POST" else Unreachable
                        raise kind(f"{self._where} answered {method} {path} with no JSON", exit_code=1) from None
                refusal = self._refusal(method, path, status, body)
                if status not in _PASSING or (method == "POST" and status not in (425, 429)):
                    if method == "POST" and (
                        status >= 500 or status == 408
                    ):  # a gateway's, perhaps, in front of a job that was made
                        raise Uncertain(refusal.message, exit_code=1)
                    raise refusal
                failure = Unreachable(refusal.message, exit_code=1)
                wait = _retry_after(headers.get("Retry-After"))
            pause = min(_FIRST_PAUSE * 2 ** (tries - 1), _LONGEST_PAUSE) * random.uniform(0.5, 1.0)
            pause = pause if wait is None else wait + random.uniform(0, 0.1 * max(wait, 0.5))
            if time.monotonic() + pause > end or self._closed.wait(pause):
                raise failure

    def _once(self, method: str, path: str, **more: Any) -> tuple[int, httpx.Headers, bytes]:
        url, left = self._access.url + path, 3
        while True:
            end = time.monotonic() + self._deadline
            with self._http.stream(method, url, **more) as response:
                body = bytearray()
                for chunk in response.iter_bytes():
                    body += chunk
                    if time.monotonic() > end:
                        raise TimeoutError(f"no whole answer within {self._deadline:.0f} s")
                    if len(body) > _LARGEST:
                        raise TimeoutError(f"an answer of more than {_LARGEST >> 20} MiB")
                if not 300 <= response.status_code < 400:
                    return response.status_code, response.headers, bytes(body)
                target = urljoin(url, response.headers.get("Location", ""))
            parts = urlsplit(target)
            same = (parts.scheme, parts.netloc) == self._place
            if not same or not left or (method != "GET" and response.status_code not in (307, 308)):
                raise self._sent_on(target)
            url, left, more = target, left - 1, {key: value for key, value in more.items() if key != "params"}

    def _sent_on(self, target: str) -> Answer:
        parts = urlsplit(target)
        to = f"{parts.scheme}://{parts.hostname or ''}"
        hint = f"is workspace_url right? It is {self._access.url}"
        return Answer(f"{self._where} sends on to {to}; the token does not follow", hint=hint, exit_code=1)

    def _refusal(self, method: str, path: str, status: int, body: bytes) -> Answer:
        said = self._hide(_message(body))
        hint = None
        if status == 401:
            message = f"{self._where} does not take the token" + (f": {said}" if said else "")
            hint = f"a new one: the dashboard's Settings, Tokens; then  export {self._token_env}=…"
        elif status == 403:
            message = f"the token may not do this in {self._where}: {method} {_short(path)}" + (
                f": {said}" * bool(said)
            )
            hint = "is it the token of this workspace?"
        elif status == 404 and path in ("/workspace", "/dedicated-node-groups", "/jobs", "/shapes", "/usersecrets"):
            message = f"there is no Lepton workspace {self._access.workspace}" + (f": {said}" if said else "")
            hint = f"workspace and workspace_url of the profile; asked was {self._access.url}"
        else:
            what = f"{method} {_short(path)}"
            message = f"{self._where} answered {what} with {status}" + (f": {said}" if said else "")
        answer = Answer(message, hint=hint, exit_code=1)
        answer.status = status
        return answer

    @property
    def _where(self) -> str:
        return f"the Lepton workspace {self._access.workspace}"

    @property
    def _token_env(self) -> str:
        return self._access.token_env

    def _away(self, error: Exception) -> Unreachable:
        return Unreachable(f"{self._where} cannot be reached: {self._hide(_reason(error))}", exit_code=1)

    def _hide(self, text: str) -> str:
        return text.replace(self._access.token, "…")

    @contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise self._away(error) from None


# What jobs say ------------------------------------------------------------------------------------------------------


def job_id(job: Mapping[str, Any]) -> str:
    """A job's id; its name where the service gives none."""
    metadata = _metadata(job)
    return str(metadata.get("id") or metadata.get("name") or "")


def created(job: Mapping[str, Any]) -> float:
    """When a job was made, in seconds since 1970; 0 where it does not say."""
    return seconds(_metadata(job).get("created_at")) or 0.0


def state(job: Mapping[str, Any]) -> str:
    return str(status(job).get("state") or "")


def status(job: Mapping[str, Any]) -> Mapping[str, Any]:
    found = job.get("status")
    return found if isinstance(found, dict) else {}


def environment(job: Mapping[str, Any]) -> dict[str, str]:
    """The variables that a job's spec gives by value."""
    spec = job.get("spec")
    envs = spec.get("envs") if isinstance(spec, dict) else None
    return {str(env.get("name")): str(env.get("value") or "") for env in envs or [] if isinstance(env, dict)}


def seconds(stamp: Any) -> float | None:
    """A time of the service, in seconds since 1970: it gives seconds in some places, milliseconds in others."""
    if not isinstance(stamp, (int, float)) or isinstance(stamp, bool) or stamp <= 0:
        return None
    value = float(stamp)
    while value > 1e11:
        value /= 1000
    return value


def _metadata(job: Mapping[str, Any]) -> Mapping[str, Any]:
    found = job.get("metadata")
    return found if isinstance(found, dict) else {}


def _items(answer: Any, key: str) -> list[dict[str, Any]]:
    """A list, or the list in a mapping."""
    found = answer.get(key) if isinstance(answer, dict) else answer
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _mapping(answer: Any, what: str) -> dict[str, Any]:
    if isinstance(answer, dict):
        return answer
    kind = Uncertain if what.startswith("POST") else Unreachable
    raise kind(f"Lepton answered {what} with something else than an object", exit_code=1)


def _id(name: str) -> str:
    return quote(name, safe="")


def _short(path: str) -> str:
    return path if len(path) <= 80 else f"{path[:80]}…"


def _message(body: bytes) -> str:
    """What an error's body says, on one line."""
    text = body[:4000].decode(errors="replace")
    try:
        read = json.loads(text)
    except ValueError:
        read = None
    if isinstance(read, dict):
        text = str(read.get("message") or read.get("error") or read.get("detail") or text)
    elif text.lstrip().startswith("<"):
        return ""  # a gateway's page
    return " ".join(text.split())[:300]


def _head(response: httpx.Response) -> bytes:
    body = b""
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > 4000:
            break
    return body


def _reason(error: Exception) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    return str(error) or type(error).__name__


def _retry_after(value: str | None) -> float | None:
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        from email.utils import parsedate_to_datetime

        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except (ValueError, TypeError):
            return None


def _certificates() -> ssl.SSLContext:
    """The machine's authorities (SSL_CERT_FILE and SSL_CERT_DIR say which), and Mozilla's where it has none."""
    import certifi

    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


def _proxy(scheme: str, host: str) -> str | None:
    if host in ("localhost", "127.0.0.1", "::1") or urllib.request.proxy_bypass(host):
        return None
    found = urllib.request.getproxies()
    proxy = found.get(scheme) or found.get("all")
    return proxy if proxy is None or "://" in proxy else f"http://{proxy}"
