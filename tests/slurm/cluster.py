"""A real Slurm on this machine: four nodes in namespaces of their own, GPUs that are /dev/null, started in a moment.

Nodes share the file system, except `<root>/local`, which each has for itself. Everything lies below one folder; what
was started is ended, and nothing else. Needs root, and the Debian packages in PACKAGES.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.slurm import accounting

WAIT = 60.0  # seconds, for what takes a few on an idle machine
PROGRAMS = ("sbatch", "srun", "slurmctld", "slurmd", "munged", "unshare", "ch-run", "mksquashfs", *accounting.PROGRAMS)
PACKAGES = "slurm-wlm munge slurmdbd slurm-wlm-mysql-plugin mariadb-server charliecloud squashfs-tools"
NO_ACCOUNTING = """\
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={root}/state/jobcomp.txt"""
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL"}


class Cluster:
    """The daemons, and the commands that talk to them."""

    def __init__(
        self, root: Path, *, nodes: int = 4, cpus: int = 4, gpus: int = 8, accounting: bool = False, keeps: int = 600
    ) -> None:
        """keeps: seconds for which the controller remembers a job that has ended (MinJobAge)."""
        self.root = root
        self.accounting, self.keeps = accounting, keeps
        self._ports = _free_ports(nodes + 3)
        self.nodes, self.cpus, self.gpus = nodes, cpus, gpus
        self.conf = root / "etc" / "slurm.conf"
        # Only what Slurm's commands need: sbatch hands its whole environment to the job.
        self.env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/root"), "SLURM_CONF": str(self.conf)}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    # Commands.

    def run(self, *command: object, check: bool = True, **env: str) -> str:
        """A client command's output."""
        done = subprocess.run(
            list(map(str, command)), env={**self.env, **env}, capture_output=True, text=True, timeout=WAIT
        )
        if check and done.returncode:
            raise AssertionError(f"{command[0]} ended with {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout

    def submit(self, *arguments: object) -> str:
        """The id of the job that `sbatch arguments…` makes."""
        return self.run("sbatch", "--parsable", *arguments).strip().partition(";")[0]

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` knows: {"JobState": "RUNNING", "Restarts": "0", …}."""
        text = self.run("scontrol", "show", "job", job, "--oneliner")
        pairs = re.findall(r"(?:^| )([A-Za-z/:]+)=(.*?)(?= [A-Za-z/:]+=|$)", text.strip())
        return {key: value.strip() for key, value in pairs}

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def until(self, holds: Callable[[], object], what: str, seconds: float = WAIT) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, f"waited {seconds:g} s in vain for: {what}"
            time.sleep(0.05)

    def wait(self, job: str, *, seconds: float = WAIT) -> dict[str, str]:
        """Its last words, as `show`, when it has ended for good: a job that waits for a requeue has not."""
        self.until(lambda: self.state(job) in ENDED, f"the end of job {job}", seconds)
        return self.show(job)

    def until_idle(self, number: int | None = None) -> None:
        """The first nodes, by default all, are up, and no job of an earlier test is left on them."""
        names = [f"node{n + 1}" for n in range(number or self.nodes)]
        states = ("sinfo", "-h", "-N", "-p", "batch", "-n", ",".join(names), "-o", "%t")
        self.until(lambda: self.run(*states).split() == ["idle"] * len(names), "idle nodes")

    # Life.

    def start(self) -> None:
        for folder in ("etc", "run", "log", "state", "spool", "dev", "local"):
            (self.root / folder).mkdir(parents=True)
        key = self.root / "etc" / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        for gpu in range(self.gpus):
            (self.root / "dev" / f"nvidia{gpu}").symlink_to("/dev/null")
        self._configure()
        run = self.root / "run"
        self._spawn(
            "munged", "munged", "--foreground", "--force", f"--socket={run}/munge.socket", f"--key-file={key}",
            f"--pid-file={run}/munged.pid", f"--seed-file={run}/munged.seed", f"--log-file={self.root}/log/munged.log",
        )  # fmt: skip
        probe = ["munge", "--no-input", f"--socket={run}/munge.socket"]
        self.until(lambda: subprocess.run(probe, capture_output=True).returncode == 0, "munged", 10)
        if self.accounting:
            accounting.start(self.root, (self._ports[-1], self._ports[-2]), self.env, self._spawn, self.until)
        self.start_controller("-i")
        for n in range(self.nodes):
            self.start_node(f"node{n + 1}")
        self.until_idle()

    def start_controller(self, *options: str) -> None:
        """-i: without the state that an earlier one has saved."""
        self._spawn("slurmctld", "slurmctld", "-D", *options, "-f", str(self.conf))
        self.until(lambda: "is UP" in self.run("scontrol", "ping", check=False), "slurmctld", 30)

    def kill_controller(self) -> None:
        daemon = self._daemons.pop("slurmctld")
        daemon.kill()
        daemon.wait()

    def start_node(self, name: str) -> None:
        """A node with a host name, a disk and process ids of its own; to kill its daemon is to pull its plug."""
        self._spawn(
            f"slurmd-{name}",
            "unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "--propagation",
            "private", "sh", "-c",
            f'hostname {name} && mount --bind {self.root}/etc/hosts /etc/hosts'
            f' && mount -t tmpfs -o mode=1777 local-{name} {self.root}/local && exec "$@"',
            "sh", "slurmd", "-D", "-N", name, "-f", str(self.conf),
        )  # fmt: skip

    def kill_node(self, name: str) -> None:
        daemon = self._daemons.pop(f"slurmd-{name}")
        daemon.kill()
        daemon.wait()

    def stop(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired, AssertionError):
            self.run("scancel", "--user=root", "--full", "--signal=KILL", check=False)
            self.run("scancel", "--user=root", check=False)
        # The controller first, while it can still save its state; the nodes by SIGKILL, which ends all on them.
        order = ["slurmctld", "slurmd", "slurmdbd", "mariadbd", "munged"]
        for name in sorted(self._daemons, key=lambda name: order.index(name.split("-")[0])):
            daemon = self._daemons.pop(name)
            daemon.send_signal(signal.SIGKILL if name.startswith("slurmd-") else signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _spawn(self, name: str, *command: str) -> None:
        with (self.root / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.env, start_new_session=True
            )

    def _configure(self) -> None:
        root, host = self.root, socket.gethostname().split(".")[0]
        names = [f"node{n + 1}" for n in range(self.nodes)]
        addresses = {name: f"127.0.1.{n + 1}" for n, name in enumerate(names)}
        lines = [f"127.0.0.1 localhost {host}", *(f"{address} {name}" for name, address in addresses.items())]
        (root / "etc" / "hosts").write_text("\n".join(lines) + "\n")
        ports = self._ports
        store = accounting.settings(root, ports[-2]) if self.accounting else NO_ACCOUNTING.format(root=root)
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={name} NodeAddr={addresses[name]} Port={port} CPUs={self.cpus} Boards=1 "
            f"SocketsPerBoard=1 CoresPerSocket={self.cpus} ThreadsPerCore=1 RealMemory=8000 Gres=gpu:{self.gpus} "
            "Feature=fast"
            for name, port in zip(names, ports[1:-2], strict=True)
        )
        (root / "etc" / "gres.conf").write_text(
            f"NodeName=node[1-{self.nodes}] Name=gpu File={root}/dev/nvidia[0-{self.gpus - 1}]\n"
        )
        (root / "etc" / "cgroup.conf").write_text("CgroupMountpoint=/sys/fs/cgroup\n")
        (root / "etc" / "plugstack.conf").write_text("")
        self.conf.write_text(f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credential has expired: 2 minutes by default.
AuthInfo=socket={root}/run/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,bf_interval=1,batch_sched_delay=0,requeue_delay=1,bf_continue
PriorityType=priority/basic
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
InactiveLimit=0
KillWait=5
MinJobAge={self.keeps}
MaxArraySize=1001
MaxJobCount=20000
JobRequeue=1
MailProg=/bin/true
PropagateResourceLimits=NONE
PlugStackConfig={root}/etc/plugstack.conf
GresTypes=gpu
{store}
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PreemptMode=OFF
PartitionName=debug Nodes=ALL Default=NO MaxTime=30 State=UP PreemptMode=OFF
# Jobs of `urgent` take the nodes of these: at once, after a while, and at a site that requeues.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=cheap Nodes=ALL PreemptMode=CANCEL GraceTime=0 State=UP
PartitionName=patient Nodes=ALL PreemptMode=CANCEL GraceTime=20 State=UP
PartitionName=again Nodes=ALL PreemptMode=REQUEUE GraceTime=0 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
""")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def missing() -> str:
    """What stands in the way of a cluster here, and what to do; empty when nothing does."""
    if absent := [program for program in PROGRAMS if not shutil.which(program)]:
        return f"no {', '.join(absent)} here: apt-get install --no-install-recommends {PACKAGES}"
    if os.geteuid():
        return "a cluster of namespaces is started by root"
    return ""


def running(root: Path, **settings: Any) -> Iterator[Cluster]:
    """A cluster below `root`, for a fixture."""
    cluster = Cluster(root, **settings)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
