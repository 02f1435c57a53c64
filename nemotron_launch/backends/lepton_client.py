"""Lepton as an executor: a run is a batch job of a workspace, found by its name, followed over the API."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nemotron_launch.backends import lepton, lepton_api, lepton_online
from nemotron_launch.backends.lepton_access import Access, access
from nemotron_launch.backends.lepton_api import Answer, Api, Uncertain
from nemotron_launch.backends.lepton_logs import Logs
from nemotron_launch.backends.lepton_states import (
    ENDING,
    OVER,
    WAITING,
    after_exit,
    ending,
    exit_line,
    in_order,
    log_key,
    nonce_of,
    sources_of,
    worst,
)
from nemotron_launch.backends.live import LogSource, Refused, Seen, Submission
from nemotron_launch.errors import UserError
from nemotron_launch.hosts import Host, Unreachable, Upload, open_host
from nemotron_launch.jobs.run import Run, State

JOB = "job.json"
RUN_ID = "NEMOTRON_RUN_ID"
_TRIES = 3  # of making a job, each after a look whether the one before has arrived
_LOOKS = (0.2, 0.5, 1.0, 2.0)  # seconds between those looks
_SKEW = 300.0  # seconds by which the service's clock may be behind ours
_UNKNOWN_FOR = 120.0  # seconds after a submission in which a job that is not there is not yet lost
_LAST_LINES = 20  # lines of a replica's end in which its exit code is looked for
_MOST_REPLICAS = 256


class LeptonClient:
    """A workspace. settle: seconds to wait, before a job counts as never made, for one that is on its way.

    looks: seconds between looks for a job whose making was not answered. retry_for, deadline: as of Api.
    """

    def __init__(
        self, contact: Mapping[str, Any], *, settle: float = 2.0, looks: Sequence[float] = _LOOKS, **limits: float
    ) -> None:
        self._contact, self._looks, self._limits = contact, looks, limits
        self._made: Api | None = None
        self._logs: Logs | None = None
        self._settle = settle
        self._ids: dict[str, str] = {}  # of node groups, by name
        self._replicas: dict[str, LogSource] = {}  # by key, as they were first seen
        self._nodes: dict[tuple[str, int], tuple[str, ...]] = {}  # by job and attempt
        self.warnings: tuple[str, ...] = ()

    @property
    def host(self) -> Host | None:
        """This machine, where it sees the volume that the runs lie on."""
        folder = str(self._contact.get("folder") or "")
        return open_host({}) if folder and Path(folder).is_dir() else None

    @property
    def _api(self) -> Api:
        if self._made is None:
            self._made = Api(self._access(), **self._limits)
        return self._made

    def _access(self) -> Access:
        found = access(self._contact)
        self.warnings = found.warnings
        return found

    # Submission.

    def check(self, run: Run, files: Sequence[Upload]) -> tuple[str, ...]:
        """See Backend: the token, the node groups, the shape, the secrets, and whether the code gets there."""
        spec = _spec(files)
        self._needs_folder(run, spec, files)
        found = lepton_online.look(
            self._api,
            groups=lepton.node_groups(spec),
            shape=str(spec["spec"].get("resource_shape") or ""),
            secrets=[env["value_from"]["secret_name_ref"] for env in spec["spec"]["envs"] if "value_from" in env],
        )
        if found.problems:
            raise found.problems[0]
        self._ids |= found.ids
        return (*self.warnings, *found.notes)

    def submit(self, run: Run, files: Sequence[Upload], *, after: Sequence[Run] = ()) -> Submission:
        """See Backend."""
        if after:
            hint = f"nemotron jobs wait {after[0].run_id} waits for it here"
            raise Refused("Lepton's jobs cannot wait for another one", where="--after", hint=hint)
        spec = _spec(files)
        name = _name(run, spec)
        spec = {**spec, "metadata": {**spec["metadata"], "name": name}}
        try:
            if missing := [group for group in lepton.node_groups(spec) if group not in self._ids]:
                self._ids |= lepton_online.look(self._api, groups=missing).ids
            spec = lepton.with_node_group_ids(spec, self._ids)
            if found := self._before(run, name):
                return found
            self._place_code(run, spec, files)
        except Answer as error:
            raise Refused(error.message, where=error.where, hint=error.hint, exit_code=error.exit_code) from None
        return self._create(run, name, spec)

    def _create(self, run: Run, name: str, spec: Mapping[str, Any]) -> Submission:
        doubt: Uncertain | None = None
        for _ in range(_TRIES):
            try:
                made = self._api.create_job(spec)
            except Uncertain as error:
                doubt = error
                if found := self._arrived(run, name):
                    return found
            except Answer as error:
                if error.status == 409 and (found := self._arrived(run, name)):
                    return found
                if doubt:  # the one before it may still come: the next command looks
                    raise Unreachable(error.message, hint=error.hint, exit_code=1) from None
                hint = error.hint
                if error.status == 409:
                    hint = f"another job is called {name}: choose another --run-id"
                raise Refused(error.message, hint=hint, exit_code=1) from None
            else:
                if doubt and (found := self._arrived(run, name)):
                    return found
                return Submission(lepton_api.job_id(made) or name)
        assert doubt
        raise Unreachable(doubt.message, hint=doubt.hint, exit_code=1)

    def _arrived(self, run: Run, name: str) -> Submission | None:
        """A job whose making was not answered, as soon as it is there. Unreachable: nobody knows."""
        for pause in (0.0, *self._looks):
            time.sleep(pause)
            try:
                if found := self._only_one(run, name):
                    return found
            except UserError as error:
                raise Unreachable(error.message, hint=error.hint, exit_code=1) from None
        return None

    def _before(self, run: Run, name: str) -> Submission | None:
        """A job of this submission that is there already, of a client that died. Refused: one of another submission."""
        ours = self._named(run, name)
        live = [job for job in ours if lepton_api.state(job) not in OVER]
        old = [job for job in live if 0 < lepton_api.created(job) < run.created - _SKEW]
        if old:
            hint = "follow it where it was submitted, or choose another --run-id"
            raise Refused(f"a run {run.run_id} lives already, as job {lepton_api.job_id(old[0])}", hint=hint)
        young = [job for job in ours if not 0 < lepton_api.created(job) < run.created - _SKEW]
        return self._only_one(run, name) if young else None

    def find(self, run: Run) -> Submission | None:
        """See Backend."""
        name = _name(run, None)
        if found := self._only_one(run, name):
            return found
        time.sleep(self._settle)
        return self._only_one(run, name)

    def _only_one(self, run: Run, name: str) -> Submission | None:
        """The job of a submission. Should there be several, made from one that came late, the first goes on alone."""
        ours = self._named(run, name)
        live = [job for job in ours if lepton_api.state(job) not in OVER]
        for job in live[1:]:
            if lepton_api.environment(job).get(RUN_ID) == run.run_id:
                self._api.stop_job(lepton_api.job_id(job))
        chosen = live[:1] or ours[-1:]
        return Submission(lepton_api.job_id(chosen[0])) if chosen else None

    def _named(self, run: Run, name: str) -> list[dict[str, Any]]:
        """Jobs of this name that are this run's: by its id in their spec, where the service shows one."""
        jobs = [job for job in self._api.jobs_named(name) if lepton_api.state(job) not in ("Deleting", "Deleted")]
        return [job for job in jobs if lepton_api.environment(job).get(RUN_ID) in (None, run.run_id)]

    def _needs_folder(self, run: Run, spec: Mapping[str, Any], files: Sequence[Upload]) -> Upload | None:
        """The code, where it is too large for the spec and has to be put into the run's folder."""
        code = next((file for file in files if file.path.startswith("code-")), None)
        if code is None or any(env["name"] == "NEMOTRON_BUNDLE_0" for env in spec["spec"]["envs"]):
            return None
        if self.host is None:
            raise Refused(
                f"the code has {len(code.data) / 2**20:.1f} MiB, more than a Lepton job carries, and {run.workdir} "
                "cannot be reached from here to put it there",
                where="remote_job_dir",
                hint="mount that volume on this machine too, at the same path\n"
                "or make run.code smaller: .nemotronignore in its folder names what is not code",
            )
        return code

    def _place_code(self, run: Run, spec: Mapping[str, Any], files: Sequence[Upload]) -> None:
        code = self._needs_folder(run, spec, files)
        if code and self.host:
            self.host.put(run.run_dir, [code])

    def submit_successor(self, run: Run) -> Submission:
        raise UserError(f"Lepton itself restarts {run.run_id}")

    # What became of it.

    def poll(self, runs: Sequence[Run]) -> dict[str, Seen]:
        """See Backend."""
        found = {}
        for run in runs:
            if run.job_id and (seen := self._look(run)):
                found[run.run_id] = seen
        return found

    def _look(self, run: Run) -> Seen | None:
        job = self._api.job(run.job_id)
        if job is None:
            if run.submitted and time.time() - run.submitted < _UNKNOWN_FOR:
                return None  # its list may lag behind
            code = worst(self._exit_files(run))
            reason = f"Lepton no longer knows the job {run.job_id}"
            return Seen(after_exit(code, "lost"), reason, code, run.attempt, started=run.started, ended=time.time())
        state, status = lepton_api.state(job), lepton_api.status(job)
        attempt = max(run.attempt, len(status.get("job_history") or ()))
        if state in OVER:
            return self._ended(run, job, state, attempt)
        if state in WAITING:
            return Seen("pending", self._why(run, state), attempt=attempt, started=run.started)
        if state == "Running":
            started = run.started or time.time()
            return Seen("running", "", attempt=attempt, nodes=self._nodes_of(run, attempt), started=started)
        now: State = run.state if run.state in ("pending", "running") else "pending"
        reason = state.lower() if state in ENDING else f"Lepton says {state or 'nothing'}, a state not known here"
        return Seen(now, reason, attempt=attempt, started=run.started)

    def _ended(self, run: Run, job: Mapping[str, Any], state: str, attempt: int) -> Seen:
        status = lepton_api.status(job)
        stopped = bool(job["spec"].get("stopped")) if isinstance(job.get("spec"), dict) else False
        self._logs_of().over.add(run.job_id)
        code = 0 if state == "Completed" else worst(self._exit_codes(run, job))
        ended = lepton_api.seconds(status.get("completion_time")) or time.time()
        started = run.started or lepton_api.seconds(status.get("creation_time")) or lepton_api.created(job) or ended
        became, reason = ending(state, stopped, code, status)
        return Seen(became, reason, code, attempt, started=started, ended=max(ended, started))

    def _why(self, run: Run, state: str) -> str:
        """Why a job waits: its state, and the last event that says more."""
        text = {"Queueing": "in the queue", "Awaiting": "waiting for its time"}.get(state, state.lower())
        text = {"PendingRetry": "waiting for its next attempt"}.get(state, text)
        with suppress(Answer):
            events = sorted(self._api.events(run.job_id), key=lambda event: str(event.get("last_observed_time")))
            if events:
                event = events[-1]
                said = " ".join(str(event[key]) for key in ("reason", "message") if event.get(key))
                text += f": {said[:200]}" if said else ""
        return text

    def _nodes_of(self, run: Run, attempt: int) -> tuple[str, ...]:
        key = (run.job_id, attempt)
        if not self._nodes.get(key):
            names = []
            with suppress(Answer):
                for replica in self._api.replicas(run.job_id)[-run.nodes :]:
                    node = (replica.get("status") or {}).get("node") or {}
                    names.append(str(node.get("name") or node.get("id") or ""))
            self._nodes[key] = tuple(filter(None, names))
        return self._nodes[key]

    # Exit codes: the files on the volume, else the replicas' last lines.

    def _exit_codes(self, run: Run, job: Mapping[str, Any]) -> dict[tuple[int, int], int]:
        if found := self._exit_files(run):
            return found
        nonce = nonce_of(job)
        if nonce is None or not self.log_sources(run):
            return {}
        for pause in (0.0, 0.5, 1.0):  # the log store may lag
            time.sleep(pause)
            with suppress(UserError):
                found = self._last_lines(run, job, nonce)
            if found:
                break
        return found

    def _exit_files(self, run: Run) -> dict[tuple[int, int], int]:
        found: dict[tuple[int, int], int] = {}
        if self.host is None:
            return found
        for path in Path(run.state_dir).glob("logs/attempt-*/node-*.exit_code"):
            with suppress(OSError, ValueError):
                attempt = int(path.parent.name.removeprefix("attempt-"))
                found[attempt, int(path.stem.removeprefix("node-"))] = int(path.read_text())
        return found

    def _last_lines(self, run: Run, job: Mapping[str, Any], nonce: str) -> dict[tuple[int, int], int]:
        found: dict[tuple[int, int], int] = {}
        start = int((lepton_api.created(job) or run.created) - 3600) * 10**9
        end = int(time.time() + 60) * 10**9
        for source in self.log_sources(run)[-_MOST_REPLICAS:]:
            key = log_key(source)
            lines = self._logs_of().tail(key).decode(errors="replace").splitlines()
            last = exit_line(lines, nonce)
            if last is None:
                stored = self._api.stored_log(*key, start=start, end=end, limit=_LAST_LINES, forward=False)
                last = exit_line([line.text for line in stored], nonce)
            if last is not None:
                found[last[0], last[1]] = last[2]
        return found

    # The end.

    def cancel(self, runs: Sequence[Run]) -> None:
        """See Backend: stop the jobs; their trainers may save."""
        for run in runs:
            job = run.job_id or (found.job_id if (found := self.find(run)) else "")
            if not job:
                continue
            try:
                self._api.stop_job(job)
            except Answer as error:
                now = self._api.job(job) if error.status in (400, 409, 422) else {}
                if now is not None and lepton_api.state(now) not in OVER:
                    raise

    def purge(self, run: Run) -> None:
        """Delete the job of a run that is over, with what the workspace keeps of it: its log too."""
        if run.job_id:
            self._api.delete_job(run.job_id)

    def clear(self, run: Run) -> None:
        """See Backend. A second submission is another job; where the volume is seen from here, its log another too."""
        logs = Path(run.state_dir, "logs")
        if self.host and logs.is_dir():
            number = 1 + sum(1 for _ in logs.parent.glob("logs-*"))
            with suppress(OSError):
                logs.rename(logs.with_name(f"logs-{number}"))

    # Logs, and a shell.

    def log_sources(self, run: Run) -> list[LogSource]:
        """See Backend."""
        if not run.job_id:
            return []
        if run.job_id not in self._logs_of().since:
            self._logs_of().since[run.job_id] = run.submitted or run.created
        try:
            replicas = self._api.replicas(run.job_id)
        except Answer as error:
            if error.status != 404:
                raise
            replicas = []  # gone; what was seen of it may be in the log store still
        for source in sources_of(run, replicas):
            self._replicas.setdefault(source.key, source)
        mine = [source for key, source in self._replicas.items() if key.startswith(f"{run.job_id}/")]
        return in_order(mine)

    def read_logs(self, wanted: Mapping[LogSource, int]) -> dict[LogSource, bytes]:
        """See Backend."""
        news = self._logs_of().read({log_key(source): offset for source, offset in wanted.items()})
        return {source: news[log_key(source)] for source in wanted if log_key(source) in news}

    def _logs_of(self) -> Logs:
        if self._logs is None:
            self._logs = Logs(self._api)
        return self._logs

    def shell(self, run: Run) -> int:
        url = str(self._contact.get("url") or "").replace("://gateway", "://dashboard", 1)
        url = url.replace("/api/v2", "", 1).replace("/workspaces", "/workspace", 1)
        hint = f"the dashboard has one, on the page of the job {run.job_id}: {url}"
        raise UserError("Lepton's API has no terminal for jobs", hint=hint, exit_code=1)

    def close(self) -> None:
        """End what is under way; a later call opens a new connection."""
        if self._logs:
            self._logs.close()
            self._logs = None
        if self._made:
            self._made.close()
            self._made = None


def open_client(contact: Mapping[str, Any]) -> LeptonClient:
    return LeptonClient(contact)


def _spec(files: Sequence[Upload]) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(next(file.data for file in files if file.path == JOB))
    return spec


def _name(run: Run, spec: Mapping[str, Any] | None) -> str:
    """The name of a submission's job: the run's, and after it was submitted before another one, the same each time."""
    if run.submitted is None:
        return str(spec["metadata"]["name"]) if spec else lepton.short_name(run.run_id)
    return lepton.short_name(f"{run.run_id}.{run.submitted:.3f}")
