"""A stand-in for a Lepton workspace: a real HTTP server on loopback that really runs jobs, and can be told to fail."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from nemotron_launch.backends.lepton import SCHEMA
from nemotron_launch.config.schema import load_schema
from nemotron_launch.config.validation import check
from tests.backends.lepton_replicas import replicas

TOKEN = "hush-hush-token"
WORKSPACE = "space"
ROOT = f"/api/v2/workspaces/{WORKSPACE}"
OVER = ("Completed", "Failed", "Stopped", "Deleted", "Archived")
GRACE = 20.0  # seconds from TERM to KILL, of Kubernetes 30


@dataclass
class Fault:
    """What happens to a call, `times` times. call: "POST jobs". kind: a status, "reset", "lost" (done, then reset),
    "drip" (done, a byte at a time), "cut" (done, half the answer), "garbage" (done, no JSON), "late" (done after a
    second)."""

    call: str
    kind: int | str
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Replica:
    id: str
    index: int
    output: Path
    made: float
    over: bool = False


@dataclass
class Job:
    """A job. play: False keeps it in its state, for a test to move."""

    id: str
    spec: dict[str, Any]
    folder: Path
    state: str = "Queueing"
    made: float = field(default_factory=time.time)
    ended: float | None = None
    attempt: int = 0
    replicas: list[Replica] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    gone: bool = False
    failed: int = 0
    succeeded: int = 0

    def as_json(self) -> dict[str, Any]:
        name = self.spec["metadata"]["name"]
        status = {
            "job_name": self.id, "state": self.state, "creation_time": int(self.made), "failed": self.failed,
            "completion_time": self.ended and int(self.ended), "succeeded": self.succeeded,
            "job_history": [{"job_name": f"{self.id}-{n}", "state": "Failed"} for n in range(self.attempt)],
        }  # fmt: skip
        spec = {**self.spec["spec"], "stopped": self.stop.is_set()}
        metadata = {"id": self.id, "name": name, "created_at": int(self.made * 1000)}
        return {"metadata": metadata, "spec": spec, "status": status}


class Service:
    """The workspace. calls: all that were made, such as "GET job". known: what the workspace has."""

    def __init__(self, folder: Path, *, plays: bool = True) -> None:
        self.folder = folder
        self.plays = plays
        self.jobs: dict[str, Job] = {}
        self.faults: list[Fault] = []
        self.calls: list[str] = []
        self.keeps_live_logs = False  # of jobs that are over
        self.chunks = 700  # bytes of a log that are sent at once, wherever that cuts
        self.cut_logs_after: int | None = None  # bytes, then the connection breaks
        self.secrets = {"hub": "hub-token"}
        self.groups = {"my-group": "ng-1", "other-group": "ng-2"}
        self.shapes = ["cpu.small", "gpu.8xh100-80gb"]
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        service = self

        class Bound(_Handler):
            pass

        Bound.service = service
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}{ROOT}"

    @property
    def env(self) -> dict[str, str]:
        return {"LEPTON_WORKSPACE_ID": WORKSPACE, "LEPTON_WORKSPACE_TOKEN": TOKEN, "LEPTON_WORKSPACE_URL": self.url}

    def close(self) -> None:
        self.closing.set()
        for thread in self._threads:
            thread.join(30)
        self._server.shutdown()
        self._server.server_close()

    def fault_for(self, call: str) -> Fault | None:
        with self._lock:
            self.calls.append(call)
            for fault in self.faults:
                if fault.call == call and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def live_jobs(self) -> list[Job]:
        return [job for job in self.jobs.values() if job.state not in OVER and not job.gone and not job.stop.is_set()]

    # Jobs at work.

    def create(self, spec: dict[str, Any]) -> Job:
        name = spec["metadata"]["name"]
        with self._lock:
            job = Job(f"{name}-{secrets.token_hex(2)}", spec, self.folder / f"job-{len(self.jobs)}")
            self.jobs[job.id] = job
        if self.plays:
            thread = threading.Thread(target=self._play, args=(job,), daemon=True)
            self._threads.append(thread)
            thread.start()
        return job

    def _play(self, job: Job) -> None:
        retries = job.spec["spec"]["max_job_failure_retry"]
        while not job.stop.is_set() and not self.closing.is_set():
            job.state = "Starting"
            codes = self._attempt(job)
            job.failed, job.succeeded = sum(map(bool, codes)), codes.count(0)
            if job.stop.is_set() or self.closing.is_set():
                break
            if not any(codes):
                job.ended, job.state = time.time(), "Completed"
                return
            if job.attempt >= retries:
                job.ended, job.state = time.time(), "Failed"
                return
            job.state = "PendingRetry"
            job.attempt += 1
            time.sleep(0.2)
        job.ended, job.state = time.time(), "Stopped"

    def _attempt(self, job: Job) -> list[int]:
        with replicas(json.dumps(job.spec), job.folder, attempt=job.attempt, secrets=self.secrets) as running:
            now = time.time()
            mine = [
                Replica(f"{job.id}-{one.index}-{secrets.token_hex(3)[:5]}", one.index, one.output, now)
                for one in running
            ]
            job.replicas += mine
            job.state = "Running"
            kill_at = None
            while True:
                codes = [one.process.poll() for one in running]
                for replica, code in zip(mine, codes, strict=True):
                    replica.over = code is not None
                if all(code is not None for code in codes):
                    return [code for code in codes if code is not None]
                ends = job.stop.is_set() or self.closing.is_set() or any(codes)
                if ends and kill_at is None:
                    kill_at = time.monotonic() + GRACE
                    for one in running:
                        with contextlib.suppress(ProcessLookupError):
                            one.kill(15)
                if self.closing.is_set() or (kill_at and time.monotonic() > kill_at):
                    for one in running:
                        one.kill(9)
                time.sleep(0.02)

    def finished(self, spec: dict[str, Any], logs: list[bytes], state: str = "Completed") -> Job:
        """A job that has been, with these logs."""
        self.plays, plays = False, self.plays
        job = self.create(spec)
        self.plays = plays
        job.folder.mkdir(parents=True)
        for index, log in enumerate(logs):
            output = job.folder / f"replica-{index}.log"
            output.write_bytes(log)
            job.replicas.append(Replica(f"{job.id}-{index}-{index:05d}", index, output, job.made, over=True))
        job.state, job.ended = state, time.time()
        return job


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    service: Service

    def log_message(self, *arguments: object) -> None:
        pass

    def _route(self) -> None:
        self.parts = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(self.parts.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        path = self.parts.path
        if not path.startswith(ROOT):
            self._send(404, {"message": "no such workspace"})
            return
        words = path.removeprefix(ROOT).strip("/").split("/")
        call = f"{self.command} {_name(words)}"
        fault = self.service.fault_for(call)
        if fault and fault.kind == "reset":
            self._reset()
            return
        if fault and isinstance(fault.kind, int):
            self._send(fault.kind, {"message": f"told to say {fault.kind}"}, fault.headers)
            return
        if "//" in path or self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"message": f"bad token {self.headers.get('Authorization')}"})
            return
        if fault and fault.kind == "late":
            time.sleep(1.5)
        if call == "GET log":
            self._stream(words[1], words[3], fault)
            return
        status, answer = self._answer(call, words, query, body)
        if fault and fault.kind == "lost":
            self._reset()
            return
        self._send(status, answer, kind=fault.kind if fault else "")

    do_GET = do_POST = do_PATCH = do_DELETE = _route

    def _answer(self, call: str, words: list[str], query: dict[str, str], body: Any) -> tuple[int, Any]:
        service = self.service
        if call == "POST jobs":
            if problems := check(load_schema(SCHEMA), body):
                return 400, {"message": problems[0].message}
            return 201, service.create(body).as_json()
        if call == "GET jobs":
            found = [job.as_json() for job in service.jobs.values() if not job.gone]
            found = [job for job in found if query.get("q", "") in job["metadata"]["name"]]
            page, size = int(query.get("page", 1)), int(query.get("page_size", 500))
            return 200, {"jobs": found[(page - 1) * size : page * size], "total": len(found)}
        simple = {
            "GET dedicated-node-groups": [
                {"metadata": {"id": id_, "name": name}, "spec": {}, "status": {}}
                for name, id_ in service.groups.items()
            ],
            "GET shapes": [{"metadata": {"id": name}, "spec": {"name": name}} for name in service.shapes],
            "GET usersecrets": [{"name": name} for name in service.secrets],
            "GET workspace": {
                "workspace_name": WORKSPACE, "workloads": {"num_image_pull_secrets": 0},
                "resource_quota": {"limit": {"accelerator_num": 16}, "used": {"accelerator_num": 8}},
            },
        }  # fmt: skip
        if call in simple:
            return 200, simple[call]
        job_id = query.get("job", "") if call == "GET logs" else words[1] if len(words) > 1 else ""
        job = service.jobs.get(job_id)
        if job is None or job.gone:
            return 404, {"message": f"job {job_id} not found"}
        if call == "GET job":
            return 200, job.as_json()
        if call == "PATCH job":
            if body["spec"]["stopped"] and job.state not in OVER:
                job.stop.set()
                job.state = "Stopping" if service.plays else "Stopped"
            return 200, job.as_json()
        if call == "DELETE job":
            job.stop.set()
            job.gone = True
            return 200, {}
        if call == "GET replicas":
            made = [(one.id, int(one.made * 1000), one.index) for one in job.replicas]
            return 200, [
                {
                    "metadata": {"id": id_, "created_at": at},
                    "id": id_,
                    "status": {"node": {"name": f"n{n}", "id": f"id{n}"}},
                }
                for id_, at, n in made
            ]
        if call == "GET events":
            event = {
                "type": "Warning",
                "reason": "Unschedulable",
                "count": 1,
                "last_observed_time": "2026-11-21T10:00:00Z",
            }
            return 200, [event] if job.state == "Queueing" else []
        if call == "GET logs":
            return 200, self._stored(job, query)
        return 404, {"message": f"no such call: {call}"}

    def _stored(self, job: Job, query: dict[str, str]) -> dict[str, Any]:
        """As Loki: lines with nanoseconds, a few at each moment, those of a page."""
        replica = next(one for one in job.replicas if one.id == query["replica"])
        start, end, limit = int(query["start"]), int(query["end"]), int(query["limit"])
        base = int(replica.made * 1e9)
        text = replica.output.read_bytes().decode(errors="replace")
        lines = [(base + n // 3 * 1000, line) for n, line in enumerate(text.split("\n")[:-1])]
        lines = [(when, line) for when, line in lines if start <= when < end]
        forward = query["direction"] == "forward"
        chosen = lines[:limit] if forward else lines[-limit:][::-1]
        return {"data": {"result": [{"stream": {}, "values": [[str(when), line] for when, line in chosen]}]}}

    def _stream(self, job_id: str, replica_id: str, fault: Fault | None) -> None:
        job = self.service.jobs.get(job_id)
        replica = next((one for one in job.replicas if one.id == replica_id), None) if job and not job.gone else None
        if job is None or replica is None:
            self._send(404, {"message": "no such replica"})
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Content-Type", "text/plain")
        self.end_headers()
        left = self.service.cut_logs_after if fault is None else 100
        with replica.output.open("rb") as file:
            while (job.state not in OVER or self.service.keeps_live_logs) and not self.service.closing.is_set():
                over = replica.over
                data = file.read(self.service.chunks)
                if not data:
                    if over:
                        break
                    time.sleep(0.02)
                    continue
                if left is not None:
                    data = data[:left]
                    left -= len(data)
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
                if left == 0:
                    self._reset()
                    return
        self.wfile.write(b"0\r\n\r\n")

    def _send(self, status: int, answer: Any, headers: dict[str, str] | None = None, kind: int | str = "") -> None:
        body = b"<html>not JSON</html>" if kind == "garbage" else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if kind == "cut":
            self.wfile.write(body[: len(body) // 2])
            self._reset()
            return
        if kind == "drip":
            with contextlib.suppress(OSError):
                for at in range(min(len(body), 400)):
                    self.wfile.write(body[at : at + 1])
                    time.sleep(0.05)
            self._reset()
            return
        self.wfile.write(body)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.wfile.flush()
        self.close_connection = True
        os.close(self.connection.detach())


def _name(words: list[str]) -> str:
    """A call by what it is about: jobs/x/replicas/y/log is log."""
    if words[0] != "jobs" or len(words) == 1:
        return words[0]
    return "job" if len(words) == 2 else words[-1]


@contextlib.contextmanager
def lepton_service(folder: Path, *, plays: bool = True) -> Iterator[Service]:
    """A workspace that lives for a test."""
    service = Service(folder, plays=plays)
    try:
        yield service
    finally:
        service.close()
