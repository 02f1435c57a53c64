"""Slurm's accounting for a test cluster: slurmdbd on a MariaDB of its own, both on loopback and below one folder."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "mariadb", "sacct")
Spawn = Callable[..., None]
Until = Callable[..., None]


def start(root: Path, ports: tuple[int, int], env: Mapping[str, str], spawn: Spawn, until: Until) -> None:
    """Start both. ports: of MariaDB and of slurmdbd, as in slurm.conf."""
    sql, dbd = ports
    run, data, log = root / "run", root / "db", root / "log"
    sock = run / "mariadb.socket"
    with (log / "install-db.out").open("wb") as out:
        subprocess.run(
            ["mariadb-install-db", "--no-defaults", f"--datadir={data}", "--user=root", "--skip-test-db",
             "--auth-root-authentication-method=normal"],
            check=True, stdout=out, stderr=out, timeout=60,
        )  # fmt: skip
    spawn(
        "mariadbd", "mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", f"--socket={sock}",
        f"--pid-file={run}/mariadbd.pid", "--bind-address=127.0.0.1", f"--port={sql}", "--skip-name-resolve",
        "--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=64M", "--innodb-log-file-size=16M",
        "--innodb-lock-wait-timeout=900", "--sync-binlog=0",
    )  # fmt: skip
    client = ["mariadb", "--no-defaults", f"--socket={sock}", "--user=root", "--execute"]
    until(lambda: subprocess.run([*client, "select 1"], capture_output=True).returncode == 0, "mariadbd", 60)
    subprocess.run(
        [*client, "create database slurm_acct_db; create user slurm@127.0.0.1 identified by 'slurm';"
         "grant all on slurm_acct_db.* to slurm@127.0.0.1;"],
        check=True, timeout=60,
    )  # fmt: skip
    conf = root / "etc" / "slurmdbd.conf"
    conf.touch(mode=0o600)
    conf.write_text(f"""\
AuthType=auth/munge
AuthInfo=socket={run}/munge.socket
DbdHost={socket.gethostname().split(".")[0]}
DbdAddr=127.0.0.1
DbdPort={dbd}
SlurmUser=root
LogFile={log}/slurmdbd.log
PidFile={run}/slurmdbd.pid
CommitDelay=0
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
""")
    spawn("slurmdbd", "slurmdbd", "-D")

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", dbd)) == 0

    until(answers, "slurmdbd", 60)
    subprocess.run(["sacctmgr", "-i", "add", "cluster", "test"], env=dict(env), capture_output=True, timeout=60)


def settings(root: Path, port: int) -> str:
    """The lines of slurm.conf for it. Comments are kept, as the client finds lost submissions by them."""
    return f"""\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={root}/run/munge.socket
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=0
JobCompType=jobcomp/none"""
