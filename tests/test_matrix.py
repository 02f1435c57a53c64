"""`steps check`: which cells there are, what is wrong with them, how they differ from stored renderings."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from nemotron_launch import matrix
from nemotron_launch.catalog import find_step, load_steps
from nemotron_launch.errors import UserError
from nemotron_launch.matrix import Case, Result
from tests.sites import SLURM, profile_file
from tests.step_trees import REPOSITORY

ENV = {"HOME": "/home/me", "USER": "me"}


@pytest.fixture
def site(tree: Path) -> Path:
    """The small tree, and a folder with one profile: `cluster`."""
    profile_file(Path("mine"), "cluster", SLURM)
    return Path("mine")


def check(site: Path, *steps: str, **options: object) -> list[Result]:
    chosen = matrix.cases([find_step(name) for name in steps or ("small",)], ["default"], ["cluster"], site)
    return matrix.check(chosen, path=site, env=ENV, **options)  # type: ignore[arg-type]


def test_every_cell_that_fits_is_there_once() -> None:
    cases = matrix.cases(load_steps(), path=REPOSITORY / "profiles")
    names = [case.name for case in cases]
    assert len(names) == len(set(names))
    assert {"rl_nemo_rl_dpo-default-slurm", "sft_megatron-tiny-local", "rl_nemo_rl_rlvr-default-lepton"} <= set(names)
    assert "rl_nemo_rl_dpo-tiny-slurm_rl_nemo_rl_dpo" in names
    assert "sft_megatron-tiny-slurm_rl_nemo_rl_dpo" not in names, "that profile is another step's"


def test_cells_can_be_chosen_by_name_and_by_file(tree: Path, site: Path) -> None:
    Path("own.yaml").write_text("defaults: step://config/tiny\noutput_dir: out\n")
    cases = matrix.cases([find_step("small")], ["tiny", "./own.yaml"], ["cluster"], site)
    assert [case.config.stem for case in cases] == ["tiny", "own"]
    with pytest.raises(UserError, match="no step has a config tny"):
        matrix.cases([find_step("small")], ["tny"], ["cluster"], site)


def test_what_does_not_compile_is_said_and_the_rest_goes_on(site: Path, tree: Path) -> None:
    (tree / "sft/small/config/default.yaml").write_text("output_dir: out\nexitt: 1\n")
    small, pairs = check(site, "small", "pairs")
    assert not small.ok
    assert "default.yaml:2: unknown key exitt" in small.problems[0]
    assert pairs.ok


def test_a_broken_profile_is_one_problem_of_each_of_its_cells(site: Path) -> None:
    profile_file(site, "cluster", SLURM, account="${oc.env:NOT_SET_ANYWHERE}")
    (result,) = check(site)
    assert "the environment variable NOT_SET_ANYWHERE is not set" in result.problems[0]


def test_a_script_that_bash_cannot_read_is_a_problem(site: Path) -> None:
    (site / "bad.j2").write_text("#!/bin/bash\nif true; then\n")
    profile_file(site, "cluster", SLURM, template="bad.j2")
    (result,) = check(site)
    assert result.problems[0].startswith("job.sbatch: ")
    assert "unexpected end of file" in result.problems[0]


def test_renderings_are_written_compared_and_removed(site: Path, tree: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    (missing,) = check(site, against=kept)
    assert "there is no rendering in" in missing.diff
    assert not kept.exists()
    assert all(result.ok for result in check(site, "small", "pairs", against=kept, update=True))
    assert {path.name for path in kept.iterdir()} == {
        "index.txt", "sft_small-default-cluster", "rl_pairs-default-cluster"
    }  # fmt: skip
    assert all(result.ok for result in check(site, "small", "pairs", against=kept, whole=True))
    (tree / "sft/small/config/default.yaml").write_text("output_dir: elsewhere\n")
    (changed,) = check(site, against=kept)
    assert "-output_dir: out/sft" in changed.diff
    assert "+output_dir: elsewhere" in changed.diff
    (_, gone) = check(site, against=kept, whole=True)
    assert "rl_pairs-default-cluster: nothing compiles to this rendering any more" in gone.diff
    check(site, against=kept, update=True, whole=True)
    assert not (kept / "rl_pairs-default-cluster").exists()
    assert [result.ok for result in check(site, against=kept, whole=True)] == [True]


def test_an_update_removes_nothing_that_is_not_a_rendering(site: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    (kept / "mine").mkdir(parents=True)
    (kept / "mine/file").write_text("x")
    check(site, against=kept, update=True, whole=True)
    assert (kept / "mine/file").exists()


def test_a_rendering_says_nothing_of_the_machine_that_made_it(
    site: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile_file(site, "cluster", {"executor": "local"})
    (here,) = check(site)
    (tree / "sft/small/train.py").write_text("# other code\n")
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    (there,) = matrix.check(
        matrix.cases([find_step("small")], ["default"], ["cluster"], tmp_path / "work/mine"),
        path=tmp_path / "work/mine",
        env=ENV,
    )
    assert here.files == there.files
    assert str(tmp_path) not in "".join(file.text for file in here.files)


def test_a_reports_xml_can_be_read_whatever_is_wrong(site: Path) -> None:
    case = matrix.cases([find_step("small")], ["default"], ["cluster"], site)[0]
    results = [Result(case), Result(case, problems=("<&>\x00\x1b \"'\n]]>",), diff="-a\n+b\n")]
    suite = ElementTree.fromstring(matrix.junit(results))
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    failure = suite.find("testcase/failure")
    assert failure is not None
    assert "<&>??" in (failure.text or "")
    assert "+b" in (failure.text or "")


def test_long_lines_of_a_difference_are_cut() -> None:
    text = matrix.diff_files({"f": "a" * 5000}, {"f": "b" * 5000}, "old", "new")
    assert max(map(len, text.splitlines())) < 300
    assert "… (5001 characters)" in text


def test_a_case_is_named_by_step_config_and_profile() -> None:
    case = Case(find_step("dpo"), Path("x/own.yaml"), "profiles/mine.yaml")
    assert case.name == "rl_nemo_rl_dpo-own-mine"


def test_the_stored_renderings_are_what_compiles_now() -> None:
    results = matrix.check(
        matrix.cases(load_steps(), path=REPOSITORY / "profiles"),
        against=REPOSITORY / "tests/renderings",
        whole=True,
        path=REPOSITORY / "profiles",
        env=ENV,
    )
    wrong = [f"{result.case.name}:\n{result.diff}{''.join(result.problems)}" for result in results if not result.ok]
    hint = "nemotron steps check --against tests/renderings --update  writes them"
    assert not wrong, "\n".join([*wrong[:3], hint])
    assert len(results) > 20
