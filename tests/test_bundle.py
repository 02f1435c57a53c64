"""The code that travels: the same for the same content, complete, and cheap to describe."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import time
from hashlib import sha256
from pathlib import Path

import pytest

from nemotron_launch import bundle
from nemotron_launch.catalog import Step, find_step
from nemotron_launch.errors import UserError
from nemotron_launch.job import Bundle
from tests.step_trees import REPOSITORY


@pytest.fixture
def small(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Step:
    """A small step, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bundle, "_unstored", {})
    return find_step("small")


def unpacked(made: Bundle) -> tarfile.TarFile:
    return tarfile.open(fileobj=io.BytesIO(bundle.read(made)))


def test_it_holds_the_package_the_step_and_the_shared_schemas(small: Step, tree: Path) -> None:
    (tree / "sft/small/__pycache__").mkdir()
    (tree / "sft/small/__pycache__/train.pyc").write_text("x")
    (tree / "sft/small/.hidden").write_text("x")
    names = unpacked(bundle.bundle(small)).getnames()
    assert names == sorted(names)
    assert {"steps/sft/small/train.py", "steps/sft/small/schema.json", "steps/artifacts.yaml"} <= set(names)
    assert {"steps/schemas/manifest.json", "nemotron_launch/trainer/spawn.py"} <= set(names)
    assert not [name for name in names if "__pycache__" in name or "/." in name or name.startswith("steps/rl")]


def test_the_file_is_what_the_job_says_of_it(small: Step) -> None:
    made = bundle.bundle(small)
    packed = bundle.read(made)
    assert (made.size, made.sha256) == (len(packed), sha256(packed).hexdigest())
    assert made.file.startswith("code-")
    assert made.file.endswith(".tar.gz")


def test_the_same_content_is_the_same_bundle_whenever_and_however_it_was_written(small: Step, tree: Path) -> None:
    first = bundle.bundle(small)
    packed = bundle.read(first)
    script = tree / "sft/small/train.py"
    text = script.read_text()
    script.unlink()
    script.write_text(text)
    os.utime(script, (1, 1))
    script.chmod(0o640)
    again = bundle.bundle(small)
    assert (again, bundle.read(again)) == (first, packed)
    for member in unpacked(again).getmembers():
        assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
        assert member.mode in (0o644, 0o755)


def test_every_change_of_content_name_or_executable_bit_is_another_bundle(small: Step, tree: Path) -> None:
    script = tree / "sft/small/train.py"
    files = {bundle.bundle(small).file}
    script.write_text(script.read_text() + "\n")
    files.add(bundle.bundle(small).file)
    script.chmod(0o755)
    files.add(bundle.bundle(small).file)
    (tree / "sft/small/more.txt").touch()
    files.add(bundle.bundle(small).file)
    assert len(files) == 4


def test_it_runs_where_it_is_unpacked(small: Step, tmp_path: Path) -> None:
    code = tmp_path / "code"
    unpacked(bundle.bundle(find_step("small"))).extractall(code, filter="data")
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import nemotron_launch.trainer.spawn as s; print(s.__file__)"],
        env={**os.environ, "PYTHONPATH": str(code)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.stdout.strip() == f"{code}/nemotron_launch/trainer/spawn.py", done.stderr


def test_describing_it_again_costs_no_more_than_looking_at_its_files(small: Step) -> None:
    bundle.bundle(small)
    start = time.perf_counter()
    bundle.bundle(small)
    # Packing takes some 100 ms here, a stat of 150 files 1 ms.
    assert time.perf_counter() - start < 0.03


def test_without_a_cache_it_is_made_each_time(small: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = bundle.bundle(small)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    made = bundle.bundle(small)
    assert made == kept
    assert sha256(bundle.read(made)).hexdigest() == made.sha256


def test_a_bundle_that_was_changed_in_the_cache_does_not_travel(small: Step, tmp_path: Path) -> None:
    made = bundle.bundle(small)
    (tmp_path / "cache/nemotron/bundles" / made.file).write_bytes(b"x" * made.size)
    with pytest.raises(UserError, match="gone or was changed"):
        bundle.read(made)


# Code of the user's own --------------------------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    (folder / "sub").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "sub/reward.py").write_text("def reward(): ...\n")
    return folder


def test_a_folder_of_ones_own_can_be_imported_by_its_name(small: Step, mine: Path) -> None:
    names = unpacked(bundle.bundle(small, [str(mine)])).getnames()
    assert {"mine/__init__.py", "mine/sub/reward.py"} <= set(names)
    assert bundle.bundle(small, [str(mine)]) != bundle.bundle(small)


def test_what_is_ignored_stays_here(small: Step, mine: Path) -> None:
    (mine / "big.bin").write_text("x")
    (mine / "out").mkdir()
    (mine / "out/log.txt").write_text("x")
    (mine / "sub/keep.txt").write_text("x")
    (mine / ".git").mkdir()
    (mine / ".git/HEAD").write_text("x")
    (mine / bundle.IGNORE_FILE).write_text("# not code\n*.bin\nout/\n")
    names = [name for name in unpacked(bundle.bundle(small, [str(mine)])).getnames() if name.startswith("mine")]
    assert names == ["mine/__init__.py", "mine/sub/keep.txt", "mine/sub/reward.py"]


def test_links_are_followed_and_circles_end(small: Step, mine: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/x.py").write_text("x = 1\n")
    (mine / "linked").symlink_to(tmp_path / "other")
    (mine / "round").symlink_to(mine)
    (mine / "nowhere").symlink_to(tmp_path / "nothing")
    names = [name for name in unpacked(bundle.bundle(small, [str(mine)])).getnames() if name.startswith("mine")]
    assert "mine/linked/x.py" in names
    assert len(names) < 20


def test_too_much_code_is_refused_with_what_is_largest(
    small: Step, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "LARGEST_CODE", 1 << 20)
    (mine / "weights.bin").write_bytes(b"0" * (3 << 20))
    with pytest.raises(UserError, match="3.0 MiB of code, more than 1.0 MiB can travel") as caught:
        bundle.bundle(small, [str(mine)])
    assert caught.value.where == "run.code"
    assert "mine/weights.bin (3.0 MiB)" in (caught.value.hint or "")
    assert bundle.IGNORE_FILE in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "message"),
    [("none", "there is no such folder"), ("file", "is no folder"), ("steps", "the name steps is the steps' own")],
)
def test_a_folder_that_cannot_travel_is_refused(small: Step, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=message):
        bundle.bundle(small, [str(tmp_path / name)])


def test_two_folders_of_one_name_are_refused(small: Step, mine: Path, tmp_path: Path) -> None:
    (tmp_path / "b/mine").mkdir(parents=True)
    with pytest.raises(UserError, match="the name mine is"):
        bundle.bundle(small, [str(mine), str(tmp_path / "b/mine")])


# Git ---------------------------------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@example.org", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(small: Step, tree: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tree of steps is a checkout, and the package lies in none."""
    git(tree, "init", "-q")
    git(tree, "add", ".")
    git(tree, "commit", "-qm", "first")
    real = bundle._checkout
    monkeypatch.setattr(bundle, "_PACKAGE", Path("/usr/lib/site-packages/nemotron_launch"))
    assert real(small) == tree
    return tree


def test_the_revision_and_whether_the_code_differs_from_it_are_known(small: Step, checkout: Path) -> None:
    made = bundle.bundle(small)
    assert (made.git_revision, made.git_dirty) == (git(checkout, "rev-parse", "HEAD"), False)
    (checkout / "rl/pairs/train.py").write_text("changed, but not part of it")
    assert not bundle.bundle(small).git_dirty
    script = checkout / "sft/small/train.py"
    script.write_text(script.read_text() + "# changed\n")
    assert bundle.bundle(small).git_dirty
    git(checkout, "commit", "-qam", "second")
    made = bundle.bundle(small)
    assert (made.git_revision, made.git_dirty) == (git(checkout, "rev-parse", "HEAD"), False)


@pytest.mark.parametrize("change", ["new", "staged", "removed"])
def test_new_staged_and_removed_files_are_differences(small: Step, checkout: Path, change: str) -> None:
    if change == "removed":
        (checkout / "sft/small/config/tiny.yaml").unlink()
    else:
        (checkout / "sft/small/new.py").write_text("")
        if change == "staged":
            git(checkout, "add", ".")
    assert bundle.bundle(small).git_dirty


def test_the_projects_own_bundle_is_small() -> None:
    # Lepton carries it in a job's environment, 2 MiB in all, as base64.
    for step in ("rl/nemo_rl/dpo", "sft/megatron"):
        assert bundle.bundle(find_step(step)).size < 600_000
    assert REPOSITORY.is_dir()
