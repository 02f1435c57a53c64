"""Blends: what they may say, and one message for what is wrong, with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron_launch.data_prep.blend import Entry, load_blend
from nemotron_launch.errors import UserError
from tests.data_prep.preparations import STEP, composed, prepare, write_blend, write_rows

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


def blend(folder: Path, text: str) -> Path:
    path = folder / "blend.yaml"
    path.write_text(text)
    return path


def refused(path: Path) -> str:
    with pytest.raises(UserError) as refusal:
        load_blend(path, STEP)
    return str(refusal.value)


def test_names_files_globs_folders_and_the_hub(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.parquet"):
        write_rows(tmp_path / name, [])
    path = blend(
        tmp_path,
        "sources:\n- path: '*.jsonl'\n- path: [sub/c.parquet, org/name]\n  split: test\n- path: hf://datasets/org/other\n",
    )
    sources = load_blend(path, STEP).sources
    assert [entry.name for entry in sources[0].entries] == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert [entry.kind for entry in sources[1].entries] == ["file", "hub"]
    assert (sources[1].split, sources[0].split) == ("test", "train")
    assert sources[2].entries == (Entry("hub", "org/other"),)


def test_json_and_the_name_datasets_are_taken_too(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [PAIR])
    path = blend(tmp_path, '{"datasets": [{"name": "mine", "path": "a.jsonl", "weight": 2.0}]}')
    (source,) = load_blend(path, STEP).sources
    assert (source.name, source.weight) == ("mine", 2.0)


def test_all_missing_sources_are_named_at_once_with_their_lines(tmp_path: Path) -> None:
    write_rows(tmp_path / "there.jsonl", [PAIR])
    (tmp_path / "folder").mkdir()
    path = blend(
        tmp_path,
        "sources:\n- path: gone.jsonl\n- path: there.jsonl\n"
        "- path:\n  - there.jsonl\n  - none-*.jsonl\n- path: folder\n",
    )
    text = refused(path)
    assert text.startswith(f"error: {path}: 3 sources are not there")
    for expected in (
        f"{path}:2: no such file: gone.jsonl",
        f"{path}:6: no file matches none-*.jsonl",
        f"{path}:7: folder is a folder, but no saved dataset; for its files, write folder/*.jsonl",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sources:\n- path: a.jsonl\n  wieght: 2\n", ":3: unknown key sources.0.wieght\n       did you mean weight?"),
        ("source:\n- path: a.jsonl\n", ":1: unknown key source\n       did you mean sources?"),
        ("sources: []\n", ":1: sources needs at least 1 entries, got 0"),
        ("{}\n", "the blend names no sources"),
        ("sources:\n- weight: 1\n", ":2: sources.0.path is missing"),
        ("sources:\n- path: a.jsonl\n  weight: 0\n", ":3: sources.0.weight must be greater than 0"),
        ("sources:\n- path: a.jsonl\n  use: test\n", ":3: sources.0.use"),
        ("sources:\n- path: a.jsonl\n  environment: maths\n", ":3: there is no environment maths\n       did you mean"),
        ("sources:\n- path: a.jsonl\n\tlimit: 3\n", ":3: not YAML: found a tab"),
        ("- a.jsonl\n", ":1: a mapping (key: value) expected"),
    ],
)
def test_mistake_is_told_with_its_line(tmp_path: Path, text: str, expected: str) -> None:
    write_rows(tmp_path / "a.jsonl", [PAIR])
    assert expected in refused(blend(tmp_path, text))


def test_blend_that_is_not_there_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such blend file"):
        prepare(composed(tmp_path / "none.yaml", tmp_path / "out"), STEP)


def test_hub_datasets_that_are_not_here_are_listed_together(tmp_path: Path) -> None:
    path = write_blend(tmp_path, [{"path": "org/one"}, {"path": "org/two", "subset": "s", "split": "test"}])
    with pytest.raises(UserError) as refusal:
        prepare(composed(path, tmp_path / "out", f"cache_dir={tmp_path / 'cache'}"), STEP)
    text = str(refusal.value)
    assert "2 datasets are not there" in text
    assert "org/one, split train: not in the local cache, and the hub cannot be reached" in text
    assert "org/two (s), split test: not in the local cache" in text
