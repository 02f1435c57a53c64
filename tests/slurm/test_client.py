"""The Slurm client on a real Slurm: submitted once, followed, cancelled, however the answers get lost."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemotron_launch.backends.live import Refused, Submission
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import replace
from nemotron_launch.hosts import Unreachable
from tests.slurm.client_runs import Site, site_of
from tests.slurm.cluster import Cluster


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """The client of this cluster, and runs for it."""
    with site_of(cluster, tmp_path, monkeypatch) as site:
        yield site


def test_a_run_is_submitted_followed_and_read(site: Site) -> None:
    run = site.submit(site.run("until(RUN / 'go')\nprint('good bye')", nodes=2))
    seen = site.until(run, lambda seen: seen.state == "running" and seen.nodes)
    assert len(seen.nodes) == 2 and seen.started and abs(seen.started - time.time()) < 120 and not seen.ended
    Path(run.run_dir, "go").touch()
    seen = site.end(run)
    assert (seen.state, seen.exit_code, seen.attempt, seen.job_id) == ("finished", 0, 0, run.job_id)
    assert seen.ended and seen.started and seen.started <= seen.ended <= time.time() + 1
    sources = site.client.log_sources(run)
    assert [(source.attempt, source.name) for source in sources] == [(0, "job"), (0, "node-0"), (0, "node-1")]
    news = site.client.read_logs(dict.fromkeys(sources, 0))
    assert [news[source].split() for source in sources[1:]] == [[b"up", b"good", b"bye"]] * 2
    assert site.client.read_logs({sources[1]: len(news[sources[1]])}) == {}


def test_the_exit_code_of_the_run_is_seen(site: Site) -> None:
    seen = site.end(site.submit(site.run("sys.exit(7)")))
    assert (seen.state, seen.exit_code, seen.reason) == ("failed", 7, "exit code 7")


def test_nothing_of_the_users_environment_travels_or_beats_the_script(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SBATCH_PARTITION": "nowhere", "SRUN_ACCOUNT": "9", "WANDB_API_KEY": "s3cr3t"}.items():
        monkeypatch.setenv(name, value)
    run = site.submit(site.run("print(json.dumps(sorted(os.environ)))"))
    assert site.end(run).state == "finished"
    names = site.logs(run)
    assert "HOME" in names and not any(name in names for name in ("SBATCH_PARTITION", "SRUN_ACCOUNT", "WANDB_API_KEY"))


# Submitted once.


@pytest.mark.parametrize(
    "lines",
    [
        # The answer does not arrive; sbatch is killed after the job was accepted.
        'real "$@" > /dev/null; ((calls > 1)) || { echo "sbatch: error: Batch job submission failed: Socket timed out'
        ' on send/recv operation" >&2; exit 1; }',
        'real "$@" > /dev/null; kill -KILL $$',
        # The controller was not there, then it is.
        'if ((calls == 1)); then echo "sbatch: error: Batch job submission failed: Unable to contact slurm controller'
        ' (connect failure)" >&2; exit 1; fi; real "$@"',
        # What a login shell or a site's wrapper says on the way.
        'echo "Welcome to 42 nodes"; real "$@"; echo "bye"',
    ],
    ids=["timed-out", "killed", "no-controller", "banner"],
)
def test_a_lost_answer_does_not_submit_twice(site: Site, lines: str) -> None:
    site.fault("sbatch", lines)
    run = site.submit(site.run())
    assert site.jobs(run) == [run.job_id]
    assert site.end(run).state == "finished"


def test_a_submission_that_shows_late_is_waited_for(site: Site) -> None:
    # sbatch lives on in the background after its answer was lost, and reaches the controller a second later.
    site.fault("sbatch", '(sleep 1; real "$@") > /dev/null 2>&1 & echo "sbatch: error: Socket timed out" >&2; exit 1')
    run = site.submit(site.run())
    assert site.jobs(run) == [run.job_id] and site.end(run).state == "finished"


def test_find_knows_a_submission_whose_client_died(site: Site) -> None:
    run = site.run("until(RUN / 'go')")
    assert site.client.find(run) is None
    # The client died before it knew; sbatch before it could write its answer into the folder.
    site.fault("sbatch", 'real "$@" > /dev/null; kill -KILL $PPID')
    site.client.host.put(run.run_dir, site.files[run.run_id])
    job = site.cluster.submit(Path(run.run_dir, "job.sbatch"))
    assert site.client.find(run) == Submission(job)
    Path(run.run_dir, "go").touch()
    site.cluster.wait(job)
    assert site.client.find(run) == Submission(job)


def test_as_long_as_the_controller_is_silent_nothing_is_submitted_again(site: Site) -> None:
    silent = 'echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1'
    site.fault("sbatch", 'real "$@" > /dev/null; kill -KILL $$')
    site.fault("squeue", silent)
    site.client._patience = 2
    run = site.run(options={"sbatch_args": ["--hold"]})
    with pytest.raises(Unreachable, match="controller did not answer"):
        site.submit(run)
    with pytest.raises(Unreachable, match="controller did not answer"):
        site.client.find(replace(run, run_dir="/nowhere", state_dir="/nowhere"))
    site.fault("squeue", 'real "$@"')
    assert site.jobs(run) == [found.job_id if (found := site.client.find(run)) else ""]


# Refused.


@pytest.mark.parametrize(
    ("options", "reason", "key"),
    [
        ({"partition": "nowhere"}, "Invalid partition name specified", "partition"),
        ({"nodelist": "node77"}, "Invalid node name specified", "nodelist or exclude"),
        ({"constraint": "slow"}, "Invalid feature specification", "constraint"),
        ({"mem": "900G"}, "Requested node configuration is not available", "nodes, gpus_per_node"),
        ({"reservation": "never"}, "Requested reservation is invalid", "reservation"),
        ({"sbatch_args": ["--no-such-option"]}, "unrecognized option '--no-such-option'", "sbatch_args"),
    ],
)
def test_a_refusal_says_slurms_reason_and_the_key_to_change(
    site: Site, options: dict[str, object], reason: str, key: str
) -> None:
    run = site.run(options=options, secrets={"API_KEY": "x"})
    with pytest.raises(Refused) as refused:
        site.submit(run)
    assert reason in refused.value.message and key in str(refused.value.where), str(refused.value)
    assert run.run_dir in str(refused.value)
    assert not Path(run.run_dir, "secrets.env").exists() and site.client.find(run) is None


def test_too_many_gpus_are_refused(site: Site) -> None:
    with pytest.raises(Refused, match="Requested node configuration is not available"):
        site.submit(site.run(gpus_per_node=80))


def test_a_host_without_slurm_is_named_with_what_to_do(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = site.run()
    monkeypatch.setenv("PATH", str(plain_programs(tmp_path)))
    with pytest.raises(UserError, match="no sbatch on this machine"):
        site.submit(run)


def plain_programs(folder: Path) -> Path:
    """A PATH with what every machine has, and no Slurm."""
    (folder / "plain").mkdir()
    for name in ("env", "sed", "grep", "mkdir", "cat", "rm", "mv", "id", "stat", "date", "head", "sort", "tail"):
        (folder / "plain" / name).symlink_to(str(shutil.which(name)))
    return folder / "plain"


# Chains, ends, and another time.


def test_a_run_after_another_waits_for_it_and_falls_with_it(site: Site) -> None:
    first = site.submit(site.run("until(RUN / 'go')\nsys.exit(3)"))
    second = site.submit(site.run(), after=[first])
    seen = site.until(second, lambda seen: seen.reason)
    assert (seen.state, seen.reason) == ("pending", "another run, or the import of its image, comes first (Dependency)")
    Path(first.run_dir, "go").touch()
    assert site.end(first).exit_code == 3
    seen = site.end(second)
    assert (seen.state, seen.reason) == ("cancelled", "the run before it did not finish")
    with pytest.raises(Refused, match="which is failed"):
        site.submit(site.run(), after=[first])


def test_cancel_ends_runs_for_good_and_those_that_are_over_are_no_error(site: Site) -> None:
    over = site.submit(site.run())
    waits = site.submit(site.run(options={"sbatch_args": ["--hold"]}, secrets={"API_KEY": "x"}))
    works = site.submit(site.run("time.sleep(300)", max_restarts=3))
    site.until(works, lambda seen: seen.state == "running")
    site.end(over)
    site.client.cancel([over, waits, works])
    site.client.cancel([over, waits, works])
    assert [site.end(run).state for run in (over, waits, works)] == ["finished", "cancelled", "cancelled"]
    assert not Path(waits.run_dir, "secrets.env").exists()


def test_a_cancelled_submission_that_nobody_heard_of_is_cancelled_too(site: Site) -> None:
    run = site.run("time.sleep(300)")
    unheard = site.submit(run)
    site.client.cancel([run])
    assert site.end(unheard).state == "cancelled"


def test_a_cleared_run_starts_anew_and_is_not_taken_for_the_old_one(site: Site) -> None:
    run = site.submit(site.run("until(RUN / 'go')"))
    Path(run.run_dir, "go").touch()
    site.end(run)
    site.client.clear(run)
    again = replace(run, state="submitting", job_id="")
    assert site.client.find(again) is None
    again = site.submit(again)
    assert again.job_id != run.job_id and site.client.find(again) == Submission(again.job_id)
    assert site.end(again).state == "finished"
    assert [source.attempt for source in site.client.log_sources(again) if source.name == "node-0"] == [0, 1]


# Folders.


def test_a_folder_that_the_nodes_do_not_see_is_said_to_be_unseen(site: Site) -> None:
    # `local` is each node's own.
    run = site.at(site.cluster.root / "local" / "mine" / "unseen-0", site.run())
    seen = site.end(site.submit(run))
    assert seen.state == "failed" and "remote_job_dir is not seen from there" in seen.reason


def test_a_folder_that_only_the_first_node_sees_ends_the_job_with_the_others_named(site: Site) -> None:
    folder = site.cluster.root / "local" / "ours" / "unseen-1"
    run = site.at(folder, site.run(nodes=2, options={"nodelist": "node[1-2]"}))
    site.client.host.put(str(folder), site.files[run.run_id])
    packed = site.folder / "folder.tar"
    subprocess.run(["tar", "-cf", packed, "-C", "/", str(folder)[1:]], check=True)
    site.cluster.run("srun", "--nodelist=node1", "--chdir=/", "tar", "-xf", packed, "-C", "/")
    job = site.cluster.submit(folder / "job.sbatch")
    assert site.cluster.wait(job)["ExitCode"] == "2:0"
    said = site.cluster.run("srun", "--nodelist=node1", "--chdir=/", "cat", folder / f"slurm-{job}.out")
    assert f"{folder} is not seen from node2: remote_job_dir must be" in said


def test_a_hostile_folder_is_only_a_folder(site: Site) -> None:
    run = site.at(site.folder / 'a\'b $(touch owned) "c"; ünï & -n *' / "mine", site.run("sys.exit(3)"))
    run = site.submit(run)
    seen = site.end(run)
    assert (seen.state, seen.exit_code) == ("failed", 3)
    assert site.client.find(run) == Submission(run.job_id)
    sources = site.client.log_sources(run)
    assert b"up" in site.client.read_logs(dict.fromkeys(sources, 0))[sources[1]]
    site.client.clear(run)
    assert not Path(run.run_dir, "claim").exists() and not list(site.folder.rglob("owned"))


SHELL = """
import sys
from nemotron_launch.backends.slurm_client import open_client
from nemotron_launch.jobs.run import Run
sys.exit(open_client({}).shell(Run("x", "", "", "", "", "slurm", *[sys.argv[1]] * 4, 1, 0.0, job_id=sys.argv[2])))
"""


def test_a_shell_opens_where_the_run_works(site: Site) -> None:
    run = site.submit(site.run("time.sleep(300)", options={"nodelist": "node2"}))
    site.until(run, lambda seen: "up" in site.logs(run))
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "r+b", buffering=0) as terminal:
        command = [sys.executable, "-c", SHELL, run.run_dir, run.job_id]
        process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
        os.close(theirs)
        terminal.write(b"echo on:$(hostname):$PWD; test -t 0 && exit 5\n")
        said = b""
        with contextlib.suppress(OSError):  # the other end was closed
            while select.select([terminal], [], [], 60)[0] and (news := terminal.read(4096)):
                said += news
        assert process.wait(60) == 5, said.decode()
    assert f"on:node2:{run.workdir}" in said.decode()
    none = subprocess.run([*command[:-1], "99999"], capture_output=True, text=True)
    assert (none.returncode, none.stderr) == (1, "error: job 99999 does not run now\n")
