"""What a Slurm knows of jobs, asked over its host: the controller, the accounting, and the folders of runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from nemotron_launch.backends import slurm_scripts as scripts
from nemotron_launch.backends.slurm_errors import is_lost, no_answer, said
from nemotron_launch.backends.slurm_output import Folder, Record, folders, newest, sacct, scontrol, squeue
from nemotron_launch.errors import UserError
from nemotron_launch.hosts import Host, Result
from nemotron_launch.jobs.run import Run


class Queue:
    """The jobs of one Slurm. patience: seconds for which an answer is waited for.

    accounting: whether sacct is of use here; it is until it says otherwise.
    """

    def __init__(self, host: Host, *, patience: float) -> None:
        self._host = host
        self._patience = patience
        self.accounting = True
        self._formats = True  # whether squeue knows our fields

    def records(self, wanted: Mapping[str, tuple[str, str]]) -> dict[str, Record]:
        """By key: what the controller knows of these (job id, cluster)."""
        found: dict[str, Record] = {}
        for cluster in {cluster for _, cluster in wanted.values()}:
            keys = {key: job_id for key, (job_id, where) in wanted.items() if where == cluster}
            bases = list(dict.fromkeys(job_id.partition("_")[0] for job_id in keys.values()))
            by_id = {record.job_id: record for record in self._squeue(bases, cluster)}
            for key, job_id in keys.items():
                if record := by_id.get(job_id) or _whole(job_id, by_id):
                    found[key] = record
        return found

    def _squeue(self, jobs: Sequence[str], cluster: str) -> list[Record]:
        if self._formats:
            done = self.ask("squeue", scripts.squeue(jobs, cluster))
            if "Invalid job format" not in done.stderr:
                return squeue(done.stdout)
            self._formats = False
        return scontrol(self.ask("scontrol", scripts.scontrol(jobs, cluster)).stdout)

    def accounted(self, wanted: Mapping[str, tuple[str, str]]) -> dict[str, Record]:
        """By key: what the accounting knows of jobs that the controller has forgotten; nothing where there is none."""
        found: dict[str, Record] = {}
        for cluster in {cluster for _, cluster in wanted.values()}:
            keys = {key: job_id for key, (job_id, where) in wanted.items() if where == cluster}
            if not self.accounting:
                continue
            bases = list(dict.fromkeys(job_id.partition("_")[0] for job_id in keys.values()))
            done = self._host.run(scripts.sacct(bases, cluster), timeout=self._patience)
            if done.code:
                # None here, or its database is away: the folders tell.
                self.accounting = not (done.code == scripts.NO_SLURM or "disabled" in done.stderr)
                continue
            by_id = {record.job_id: record for record in sacct(done.stdout)}
            found |= {key: record for key, job_id in keys.items() if (record := by_id.get(job_id))}
        return found

    def folders_of(self, runs: Sequence[Run]) -> dict[str, Folder]:
        """By path: what the folders of these runs say."""
        paths = "".join(f"{run.state_dir}\n" for run in runs)
        return folders(self._host.run(scripts.FOLDERS, stdin=paths.encode()).stdout) if paths else {}

    def ask(self, command: str, script: str) -> Result:
        """A question to the controller. That it does not know a job is an answer."""
        done = self._host.run(script, timeout=max(30.0, self._patience))
        if done.code == scripts.NO_SLURM:
            raise self.no_slurm(command)
        if done.code and not re.search(r"Invalid job id|Invalid job format|already complet", done.stderr):
            if is_lost(done):
                raise no_answer(command, done)
            raise UserError(f"{command}: {said(done)}", where=self._host.name or None, exit_code=1)
        return done

    def no_slurm(self, command: str) -> UserError:
        """There is no Slurm on this host."""
        at = self._host.name or "this machine"
        hint = "use a login node: tunnel: {type: ssh, host: …}"
        if self._host.name:
            hint = "where it comes from modules, set tunnel.remote_shell: login"
        return UserError(f"no {command} on {at}", where="tunnel", hint=hint, exit_code=1)


def _whole(job_id: str, by_id: Mapping[str, Record]) -> Record | None:
    """Of an array asked for as a whole: a point that is not over, else the last one."""
    if "_" in job_id:
        return None
    return newest(record for each, record in by_id.items() if each.partition("_")[0] == job_id)
