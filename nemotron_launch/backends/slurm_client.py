"""Slurm, reached from its login node or over SSH: submit once, follow, cancel, go on. See live.Backend."""

from __future__ import annotations

import posixpath
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from nemotron_launch import image_jobs
from nemotron_launch.backends import slurm_scripts as scripts
from nemotron_launch.backends.live import POINTS, LogSource, Refused, Seen, Submission
from nemotron_launch.backends.slurm import MAIN, SECRETS, SHELL
from nemotron_launch.backends.slurm_errors import is_lost, no_answer, refused
from nemotron_launch.backends.slurm_output import (
    Folder,
    folders,
    newest,
    restarts_before,
    sacct,
    squeue,
)
from nemotron_launch.backends.slurm_queue import Queue
from nemotron_launch.backends.slurm_states import FALLEN, judge
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import replace
from nemotron_launch.hosts import Host, Result, Unreachable, Upload, open_host
from nemotron_launch.jobs.run import Run

_ANSWER = re.compile(r"^\s*(\d+)(?:;(\S+))?\s*$", re.MULTILINE)


class SlurmClient:
    """One Slurm, by the host on which its commands are. It keeps nothing but the connection.

    patience: seconds for which a controller that does not answer is asked again. settle: seconds for which a
    submission without an answer may still appear before another one is made.
    """

    def __init__(self, host: Host, *, patience: float = 90.0, settle: float = 12.0) -> None:
        self.host = host
        self._patience = patience
        self._settle = settle
        self._queue = Queue(host, patience=patience)

    # Submission.

    def check(self, run: Run, files: Sequence[Upload]) -> tuple[str, ...]:
        """See Backend."""
        if self.host.name:
            self.host.run(":")
        return ()

    def submit(self, run: Run, files: Sequence[Upload], *, after: Sequence[Run] = ()) -> Submission:
        """See Backend."""
        waits_for = self._after(run, after)
        self.host.put(run.run_dir, files)
        image = self._image(run, files)
        waits_for += image.job_ids
        options = [f"--dependency=afterok:{':'.join(waits_for)}", "--kill-on-invalid-dep=yes"] if waits_for else []
        if run.point is not None:
            options.append(f"--array={run.point}")
        elif points := run.options.get(POINTS):
            limit = f"%{run.options['max_parallel']}" if run.options.get("max_parallel") else ""
            options.append(f"--array={','.join(map(str, points))}{limit}")
        return replace(self._submit(run, options, {}), notes=image.notes)

    def submit_successor(self, run: Run) -> Submission:
        """See Backend."""
        folder = self._queue.folders_of([run]).get(run.state_dir, Folder())
        before = folder.holder or run.job_id
        if folder.heir:
            return Submission(folder.heir, run.cluster)
        if before != run.job_id and not folder.wants_heir:  # the successor that somebody else made is at work
            return Submission(before, run.cluster)
        restarts = folder.successor[2] if folder.wants_heir and folder.successor else self._used(run, before) + 1
        if folder.cancelled or restarts > run.max_restarts:
            why = "was cancelled" if folder.cancelled else f"has had its {run.max_restarts} restarts"
            raise Refused(f"{run.run_id} {why}", exit_code=1)
        mark = f"restart:{restarts} nemotron:{_name(run)}"
        options = [f"--comment={' '.join(filter(None, [str(run.options.get('comment') or ''), mark]))}"]
        if run.point is not None:
            options.append(f"--array={run.point}")
        found, _ = self._look(run, mark)
        if found:  # the job's own handler was ended before it could say so
            return found
        env = {"NEMOTRON_SUCCEEDS": before, "NEMOTRON_RESTARTS": str(restarts)}
        why = (folder.successor[3] if folder.successor else "") or "taken away"
        return self._submit(run, options, env, mark=mark, notes=scripts.heir(before, run.point, restarts, why))

    def _used(self, run: Run, job_id: str) -> int:
        """How often a run had been restarted when this job of its began its last attempt."""
        record = self._queue.records({"": (job_id, run.cluster)}).get("")
        return restarts_before(record.comment) + (record.restarts or 0) if record else run.attempt

    def _after(self, run: Run, after: Sequence[Run]) -> list[str]:
        """The jobs that a run waits for. Slurm takes one that it has forgotten for ended well."""
        waits_for = [one for one in after if one.state != "finished"]
        seen = self.poll([one for one in waits_for if one.job_id])
        ids = []
        for one in waits_for:
            now = seen.get(one.run_id)
            state = now.state if now else one.state
            if state == "finished":
                continue
            if state not in ("pending", "running"):
                raise Refused(f"{run.run_id} cannot come after {one.run_id}, which is {state}", where="--after")
            ids.append((now.job_id if now else "") or one.job_id)
        return ids

    def _image(self, run: Run, files: Sequence[Upload]) -> image_jobs.Ensured:
        """The import of the run's image, where it has one that is not there yet."""
        if not any(file.path.startswith("import_") for file in files):
            return image_jobs.Ensured()
        # Anew for the first submission only: whoever submits the run again wants it to go on.
        force = bool(run.options.get("force_squash")) and run.submitted is None
        script = image_jobs.ensure(run.run_dir, force=force)
        done = self.host.run(script, timeout=max(60.0, self._patience))
        if done.code == scripts.NO_SLURM:
            raise self._queue.no_slurm("sbatch")
        if done.code and is_lost(done):
            raise no_answer("sbatch", done)
        try:
            return image_jobs.ensured(done)
        except UserError as error:
            self._forget_secrets([run])
            raise Refused(error.message, where=error.where, hint=error.hint, exit_code=1) from None

    def _submit(
        self,
        run: Run,
        options: Sequence[str],
        env: Mapping[str, str],
        *,
        mark: str = "",
        notes: tuple[str, str] = ("", ""),
    ) -> Submission:
        """sbatch, until its answer is known. mark: what its comment ends in, where the name says too little.

        notes: what the folder is told before and after, as shell.
        """
        folder = run.state_dir
        script = posixpath.join(run.run_dir, MAIN)
        command = scripts.submit(folder, script, options, env, before=notes[0], record=notes[1])
        end = time.monotonic() + self._patience
        while True:
            lost: Unreachable
            try:
                done = self.host.run(command, timeout=max(30.0, self._patience))
            except Unreachable as error:
                lost = error
            else:
                if done.code == 0 and (answer := _ANSWER.findall(done.stdout)):
                    return self._submitted(run, *answer[-1])
                if done.code == scripts.NO_SLURM:
                    raise self._queue.no_slurm("sbatch")
                if done.code and done.code != scripts.BUSY and not is_lost(done):
                    self._forget_secrets([run])
                    raise self._too_many(done) or refused(run, done)
                lost = no_answer("sbatch", done)
            found = self._await(run, mark, end, lost)
            if found:
                return found

    def _too_many(self, done: Result) -> Refused | None:
        """The refusal of an array with more points than the site takes, with their number."""
        if "Invalid job array specification" not in done.stderr:
            return None
        found = re.search(r"MaxArraySize\s*=\s*(\d+)", self.host.run("scontrol show config").stdout)
        most = f", which is {found.group(1)}" if found else ""
        hint = "nothing was submitted; make several sweeps of it"
        text = f"there are more points than this cluster takes in one array{most}"
        return Refused(text, where="--sweep", hint=hint, exit_code=1)

    def _submitted(self, run: Run, job_id: str, cluster: str) -> Submission:
        return Submission(job_id if run.point is None else f"{job_id}_{run.point}", cluster)

    def _await(self, run: Run, mark: str, end: float, lost: Unreachable) -> Submission | None:
        """Look for a submission whose answer was lost, which may appear a moment later; None when it is not there."""
        patient_until = time.monotonic() + self._settle
        pause = 0.1
        while True:
            try:
                found, busy = self._look(run, mark)
            except Unreachable as error:
                # As long as nobody can say, nothing is submitted again.
                patient_until = time.monotonic() + self._settle
                if time.monotonic() > end:
                    raise error from lost
            except UserError as error:  # such as a login that is refused this time: the job may exist all the same
                raise Unreachable(error.message, where=error.where, hint=error.hint, exit_code=1) from lost
            else:
                if found:
                    return found
                if time.monotonic() > end:
                    raise lost
                if not busy and time.monotonic() > patient_until:
                    return None
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def find(self, run: Run) -> Submission | None:
        """See Backend."""
        end = time.monotonic() + self._settle
        while True:
            found, busy = self._look(run, "")
            if found or not busy:
                return found
            if time.monotonic() > end:
                raise Unreachable(f"the submission of {run.run_id} is still under way", exit_code=1)
            time.sleep(0.5)

    def _look(self, run: Run, mark: str) -> tuple[Submission | None, bool]:
        """Who carries the run, by its folder, the queue and the accounting; and whether an sbatch is still at it."""
        name, place = _name(run), list(dict.fromkeys([run.state_dir, run.run_dir]))
        days = max(1, int((time.time() - run.created) // 86400) + 2)
        text = scripts.look(place, name, days, accounting=self._queue.accounting, clusters=_clusters(run))
        done = self.host.run(text, timeout=max(30.0, self._patience))
        parts = dict(re.findall(r"^==(\w+)\n(.*?)(?=^==|\Z)", done.stdout, re.MULTILINE | re.DOTALL))
        seen = folders(parts.get("folders", ""))
        own, whole = seen.get(run.state_dir, Folder()), seen.get(run.run_dir, Folder())
        busy = own.busy or whole.busy

        def ours(job_id: str) -> bool:
            return bool(job_id) and job_id not in own.past and job_id.partition("_")[0] not in own.past

        if not mark:  # a successor is another job than the one that holds the claim
            for job_id in (own.heir, own.holder):
                if ours(job_id):
                    return Submission(job_id, run.cluster), busy
        elif own.heir:
            return Submission(own.heir, run.cluster), busy
        for folder in () if mark else (own, whole):
            job_id, _, cluster = folder.submitted.partition(";")
            job_id = job_id if run.point is None else f"{job_id}_{run.point}"
            if folder.submitted and ours(job_id):
                return Submission(job_id, cluster), busy
        records = [*squeue(parts.get("squeue", "")), *sacct(parts.get("sacct", ""))]
        found = newest(
            record
            for record in records
            if record.name == name[: len(record.name)]
            and len(record.name) >= min(len(name), 128)
            and (not record.comment or len(record.comment) > 390 or record.comment.endswith(mark or f"nemotron:{name}"))
            and (not mark or record.comment)
            and (run.point is None or record.job_id.endswith(f"_{run.point}"))
            and ours(record.job_id)
            and not record.turned_away
        )
        if found:
            job_id = found.job_id if run.point is not None else found.job_id.partition("_")[0]
            return Submission(job_id, run.cluster), busy
        code = parts.get("code", "").strip()
        if code == str(scripts.NO_SLURM):
            raise self._queue.no_slurm("squeue")
        if code != "0" and "Invalid job id" not in done.stderr:
            raise no_answer("squeue", done)
        return None, busy

    # Following.

    def poll(self, runs: Sequence[Run]) -> dict[str, Seen]:
        """See Backend. One squeue for all; the folders, sacct and a second squeue only for those that ended."""
        records = self._queue.records({run.run_id: (run.job_id, run.cluster) for run in runs if run.job_id})
        ended = [run for run in runs if not (record := records.get(run.run_id)) or record.over]
        if not ended:
            return {run.run_id: seen for run in runs if (seen := judge(records[run.run_id], Folder()))}
        places = self._queue.folders_of(ended)
        # Where another job has taken over, that one counts.
        moved = {}
        for run in ended:
            place = places.get(run.state_dir, Folder())
            record = records.get(run.run_id)
            now = place.heir or place.holder
            if now and now not in place.past and now not in (run.job_id, record.job_id if record else ""):
                moved[run.run_id] = (now, run.cluster)
        now_there = self._queue.records(moved)
        records = {run_id: record for run_id, record in records.items() if run_id not in moved} | now_there
        unknown = {
            run.run_id: moved.get(run.run_id, (run.job_id, run.cluster)) for run in ended if run.run_id not in records
        }
        records |= self._queue.accounted({run_id: key for run_id, key in unknown.items() if key[0]})
        found = {}
        for run in runs:
            record, place = records.get(run.run_id), places.get(run.state_dir, Folder())
            if record and restarts_before(record.comment) and record.restarts is None:
                record = replace(record, restarts=0)
            next_restart = 1 + (restarts_before(record.comment) + (record.restarts or 0) if record else run.attempt)
            if place.wants_heir and place.successor:
                next_restart = place.successor[2]
            seen = judge(record, place, restarts_left=next_restart <= run.max_restarts)
            if seen:
                moved_to = moved.get(run.run_id, ("",))[0]
                found[run.run_id] = replace(seen, job_id=moved_to) if moved_to else seen
        return found | self._without_image([run for run in ended if run.run_id in found], found)

    def _without_image(self, runs: Sequence[Run], found: Mapping[str, Seen]) -> dict[str, Seen]:
        """Of the runs whose predecessor failed those for which it was the import of their image, with its reason."""
        fallen = [run for run in runs if found[run.run_id].reason == FALLEN]
        why: dict[str, str] = {}
        for folder in dict.fromkeys(run.run_dir for run in fallen):
            note = b"".join(self.host.read({posixpath.join(folder, image_jobs.NOTE): 0}).values()).decode()
            logs = {line.partition(" ")[2]: 0 for line in note.splitlines()}
            said = self.host.read(logs).values()
            why[folder] = image_jobs.failure("".join(data.decode(errors="replace") for data in said))
        return {
            run.run_id: replace(found[run.run_id], state="failed", exit_code=1, reason=f"its image: {why[run.run_dir]}")
            for run in fallen
            if why[run.run_dir]
        }

    # Ending.

    def cancel(self, runs: Sequence[Run]) -> None:
        """See Backend. Also jobs of these runs that the ledger has not heard of: a successor, a lost submission."""
        paths = "".join(f"{run.state_dir}\n" for run in runs)
        self.host.run(scripts.CANCELLED, stdin=paths.encode())
        jobs: dict[str, list[str]] = {}
        names = {_name(run): run for run in runs}
        for run in runs:
            if run.job_id:
                jobs.setdefault(run.cluster, []).append(run.job_id)
        wanted = {(_name(run), run.point) for run in runs}
        for record in squeue(self._queue.ask("squeue", scripts.squeue_names(names)).stdout):
            task = record.job_id.partition("_")[2]
            asked = {(record.name, None), (record.name, int(task) if task else None)} & wanted
            if asked and not record.over:
                jobs.setdefault(names[record.name].cluster, []).append(record.job_id)
        for cluster, ids in jobs.items():
            self._queue.ask("scancel", scripts.scancel(dict.fromkeys(ids), cluster))
        self._forget_secrets(runs)

    def _forget_secrets(self, runs: Sequence[Run]) -> None:
        """Remove the secrets of runs that are over; points share theirs with others, which may be at work."""
        files = [posixpath.join(run.run_dir, SECRETS) for run in runs if run.point is None]
        if files:
            self.host.run(f"rm -f {scripts.sh_words(files)}")

    def clear(self, run: Run) -> None:
        """See Backend."""
        self.host.run(scripts.clear(run.state_dir, run.job_id))

    def close(self) -> None:
        self.host.close()

    # Logs, and a shell.

    def log_sources(self, run: Run) -> list[LogSource]:
        """See Backend."""
        done = self.host.run(scripts.logs(run.state_dir, run.run_dir, run.point))
        found = []
        for path in filter(None, done.stdout.split("\n")):
            attempt = re.search(r"/logs/attempt-(\d+)/([^/]+)\.log$", path)
            source = (int(attempt.group(1)), attempt.group(2)) if attempt else (0, "job")
            found.append(LogSource(*source, path))
        return sorted(found, key=lambda source: (source.attempt, source.name != "job", _natural(source.name)))

    def read_logs(self, wanted: Mapping[LogSource, int]) -> dict[LogSource, bytes]:
        """See Backend."""
        read = self.host.read({source.key: offset for source, offset in wanted.items()})
        return {source: data for source in wanted if (data := read.get(source.key))}

    def shell(self, run: Run) -> int:
        """See Backend."""
        script = posixpath.join(run.run_dir, SHELL)
        return self.host.interactive(f"exec bash {scripts.sh(script)} {scripts.sh(run.job_id)}")


def open_client(contact: Mapping[str, Any]) -> SlurmClient:
    """The Slurm of a profile's `tunnel`."""
    return SlurmClient(open_host(contact))


def _name(run: Run) -> str:
    """The job's name: the run's id, for a point that of its sweep."""
    return run.sweep or run.run_id


def _clusters(run: Run) -> str:
    """The clusters that the profile names for sbatch, where a lost submission must be looked for."""
    found = [re.fullmatch(r"(?:--clusters?=|-M\s*)(.+)", one) for one in run.options.get("sbatch_args") or ()]
    return next((one.group(1) for one in found if one), run.cluster)


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
