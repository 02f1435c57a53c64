"""Images imported by jobs on a real Slurm, by a stand-in for enroot (tests/enroot.py) that makes real squash files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nemotron_launch.hosts import Result
from nemotron_launch.image_jobs import Ensured, ensure, ensured
from tests.conftest import Nemotron
from tests.enroot import Enroot
from tests.sites import SLURM, profile_file
from tests.slurm.cluster import Cluster

NAME = "nvcr.io+nvidia+nemo-rl+v1.sqsh"
URI = "docker://nvcr.io#nvidia/nemo-rl:v1"


class Site:
    """The command with enroot in its PATH, and the profile `cluster` for pyxis."""

    def __init__(self, cluster: Cluster, nemotron: Nemotron, folder: Path) -> None:
        self.cluster, self.nemotron, self.folder = cluster, nemotron, folder
        self.enroot = Enroot(folder / "bin")
        self.jobs = folder / "jobs"
        self.images = self.jobs / "images"
        self.jobs.mkdir()
        keys: dict[str, Any] = {**SLURM, "account": None, "mem": 100, "time": 5, "runtime": "pyxis", "build_time": 5}
        keys |= {"remote_job_dir": str(self.jobs), "image": "nvcr.io/nvidia/nemo-rl:v1", "python": sys.executable}
        profile_file(folder / "profiles", "cluster", keys)
        self.env = {
            **cluster.env,
            "PATH": f"{self.enroot.folder}:{os.environ['PATH']}",
            "NEMOTRON_STATE_DIR": str(folder / "state"),
        }

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        places = ("--profiles", str(self.folder / "profiles")) if words[0] != "jobs" else ()
        return self.nemotron(*words, *places, **self.env)

    def squash(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self("images", "squash", "cluster", "--wait", *words)

    def listed(self, *words: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self("images", "list", "cluster", "--json", *words).stdout)
        return found

    def submit(self, *words: str) -> dict[str, Any]:
        done = self("steps", "run", "small", "-b", "cluster", "--json", *words)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found


@pytest.fixture
def site(cluster: Cluster, nemotron: Nemotron, tmp_path: Path, tree: Path) -> Iterator[Site]:
    made = Site(cluster, nemotron, tmp_path)
    yield made
    for job in made.cluster.run("squeue", "--noheader", "--format=%i").split():
        made.cluster.run("scancel", job, check=False)


def test_an_image_is_imported_once_by_a_job_and_listed(site: Site) -> None:
    done = site.squash()
    assert done.returncode == 0, done.stderr
    assert f"imported {URI} as {site.images / NAME}" in done.stderr
    assert [words[3:] for words in site.enroot.imports] == [[URI]]
    (row,) = site.listed()
    assert (row["name"], row["uri"], row["whole"], row["moved"]) == (NAME, URI, True, False)
    assert row["digest"] == "sha256:" + "1" * 64 and row["size"] == (site.images / NAME).stat().st_size
    again = site.squash()
    assert again.stdout == f"{site.images / NAME} is there\n" and len(site.enroot.imports) == 1
    assert site.squash("--force").returncode == 0 and len(site.enroot.imports) == 2


def test_a_run_waits_for_the_import_of_its_image(site: Site) -> None:
    """Its own srun is no pyxis, so that the run itself fails; that it came after the import is what counts."""
    site.enroot.takes(1)
    done = site("steps", "run", "small", "-b", "cluster")
    assert f"{URI} is imported first, by job " in done.stdout, done.stderr
    row = json.loads(site("jobs", "status", "last", "--json").stdout)
    importing = done.stdout.partition("by job ")[2].split()[0]
    assert site.cluster.wait(importing)["JobState"] == "COMPLETED"
    ended = site.cluster.wait(row["job_id"])
    assert (site.images / NAME).exists() and ended["Dependency"] == "(null)"
    assert "no whole image" not in "".join(path.read_text() for path in Path(row["run_dir"]).glob("slurm-*.out"))


def test_an_import_that_fails_takes_the_run_with_it_and_says_why(site: Site) -> None:
    site.enroot.refuses()
    row = site.submit()
    site.cluster.until(lambda: site.cluster.state(row["job_id"]) == "CANCELLED", "the end of the run")
    shown = json.loads(site("jobs", "status", "last", "--json").stdout)
    assert shown["state"] in ("cancelled", "failed")
    assert "nvcr.io refuses the login" in shown["reason"] and "~/.config/enroot/.credentials" in shown["reason"]
    done = site.squash()
    assert done.returncode == 1 and "nvcr.io refuses the login" in done.stderr


def test_however_many_ask_one_import_is_made(site: Site) -> None:
    site.enroot.takes(1)
    folders = [site.images / ".imports" / f"asks-{n}" for n in range(6)]
    script = site("images", "squash", "cluster", "-d").stdout
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "import_image.sbatch").write_text(re.sub(r"--output=.*/", f"--output={folder}/", script))

    def ask(folder: Path) -> Ensured:
        done = subprocess.run(
            ["sh", "-c", ensure(str(folder))], env=site.env, capture_output=True, text=True, timeout=60
        )
        return ensured(Result(done.returncode, done.stdout, done.stderr))

    with ThreadPoolExecutor(6) as pool:
        asked = list(pool.map(ask, folders))
    jobs = {job for one in asked for job in one.job_ids}
    assert {site.cluster.wait(job)["JobState"] for job in jobs} == {"COMPLETED"}
    assert len(site.enroot.imports) == 1


def test_a_tag_that_has_moved_is_reported_and_imported_anew_when_asked(site: Site) -> None:
    assert site.squash().returncode == 0
    site.enroot.means("sha256:" + "2" * 64)
    assert site.listed("--check")[0]["moved"] is True
    done = site("steps", "run", "small", "-b", "cluster")
    assert "has moved since it was imported" in done.stdout, done.stderr
    assert site("steps", "run", "small", "-b", "cluster", "--force-squash").returncode == 0
    site.cluster.until(lambda: len(site.enroot.imports) == 2, "the second import")
    site.cluster.until(lambda: site.listed("--check")[0]["moved"] is False, "the new image")


def test_half_an_image_is_imported_again(site: Site) -> None:
    assert site.squash().returncode == 0
    with (site.images / NAME).open("r+b") as file:
        file.truncate(100)
    assert site.listed()[0]["whole"] is False
    assert site.squash().returncode == 0 and len(site.enroot.imports) == 2
    assert site.listed()[0]["whole"] is True


def test_images_are_removed_by_name_or_age_when_confirmed(site: Site) -> None:
    assert site.squash().returncode == 0
    ask = ("images", "prune", "cluster")
    assert "would be removed" in site(*ask, NAME).stderr and (site.images / NAME).exists()
    assert site(*ask, "--unused-for", "1", "--yes").stdout == "" and (site.images / NAME).exists()
    wrong = site(*ask, "nvcr.io+nvidia+nemo-rl+v2")
    assert wrong.returncode == 2 and f"did you mean {NAME}?" in wrong.stderr
    assert site(*ask, "--unused-for", "0", "--yes").returncode == 0
    assert not (site.images / NAME).exists()
    assert site.listed() == []


def test_a_profile_that_keeps_no_images_is_told_so(site: Site) -> None:
    profile_file(site.folder / "profiles", "here", {"executor": "local"})
    done = site("images", "list", "here")
    assert done.returncode == 2 and "local keeps no images" in done.stderr
    done = site("images", "squash", "cluster", "/lustre/x.sqsh")
    assert done.returncode == 2 and "a file on the cluster already" in done.stderr


def test_an_import_that_slurm_refuses_names_the_key(site: Site) -> None:
    path = site.folder / "profiles/cluster.yaml"
    path.write_text(path.read_text() + "build_partition: nowhere\n")
    done = site.squash()
    assert done.returncode == 1
    assert "build_partition: Slurm refuses the import of the image: Invalid partition name specified" in done.stderr
