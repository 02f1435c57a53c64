"""Rows of every format with their places, and what unusable data says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemotron_launch.errors import UserError
from nemotron_launch.trainer import paths
from nemotron_launch.trainer.data.sources import BadRows, Row, data_section, read_rows

ROWS = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}, {"prompt": "c", "n": 3}]


def rows(tmp_path: Path, data_path: object, **section: object) -> list[Row]:
    return list(read_rows({"data_path": data_path, **section}, step_dir=tmp_path, key="data.train"))


def prompts(read: list[Row]) -> list[str]:
    return [row.data["prompt"] for row in read if row.data]


def test_jsonl_rows_know_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes('\ufeff{"prompt": "a"}\n\n  \r\n{"prompt": "é"}'.encode())
    assert rows(tmp_path, str(file)) == [Row(f"{file}:1", {"prompt": "a"}), Row(f"{file}:4", {"prompt": "é"})]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "not valid JSON"),
        (b'{"prompt": "\xff"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'["prompt"]', "not a JSON object"),
    ],
)
def test_unreadable_line_is_one_bad_row(tmp_path: Path, line: bytes, problem: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}\n')
    read = rows(tmp_path, str(file))
    assert prompts(read) == ["a", "b"]
    assert read[1] == Row(f"{file}:2", None, problem)


def test_json_may_be_a_list_or_lines(tmp_path: Path) -> None:
    whole, lines = tmp_path / "whole.json", tmp_path / "lines.json"
    whole.write_text(json.dumps([*ROWS, 5], indent=2))
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert [row.data for row in rows(tmp_path, str(lines))] == ROWS
    read = rows(tmp_path, str(whole))
    assert [row.data for row in read[:3]] == ROWS
    assert read[2].place == f"{whole}:3"  # a row's number: lines mean nothing in a list
    assert read[3] == Row(f"{whole}:4", None, "not a JSON object")


def test_csv_keeps_numbers_as_text_and_knows_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('prompt,chosen\n"two\nlines",012\n\nshort\nlast,7\n')
    read = rows(tmp_path, str(file))
    assert [row.data for row in read] == [
        {"prompt": "two\nlines", "chosen": "012"},
        None,
        {"prompt": "last", "chosen": "7"},
    ]
    assert [row.place for row in read] == [f"{file}:2", f"{file}:5", f"{file}:6"]
    assert read[1].problem == "1 fields under a header of 2"


def test_parquet_and_both_kinds_of_arrow(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "stream.arrow", "file.arrow"):
        read = rows(tmp_path, f"step://{name}")
        assert [row.data for row in read] == ROWS
        assert read[1].place == f"{tmp_path / name}:2"


def test_saved_datasets_have_splits(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict({"train": Dataset.from_list(ROWS), "few": Dataset.from_list(ROWS[:1])}).save_to_disk(tmp_path / "many")
    assert prompts(rows(tmp_path, str(tmp_path / "one"))) == ["a", "b", "c"]
    assert prompts(rows(tmp_path, str(tmp_path / "many"), split="few")) == ["a"]
    with pytest.raises(UserError, match=r"no split test(.|\n)*it has train, few"):
        rows(tmp_path, str(tmp_path / "many"), split="test")


def test_globs_and_lists_join_files_in_order(tmp_path: Path) -> None:
    for name, row in zip(("b", "a", "c"), ROWS, strict=True):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    assert prompts(rows(tmp_path, str(tmp_path / "[ab].jsonl"))) == ["b", "a"]  # a.jsonl first
    assert prompts(rows(tmp_path, [str(tmp_path / "c.jsonl"), "step://b.jsonl"])) == ["c", "a"]


@pytest.mark.parametrize(
    ("data_path", "message"),
    [
        (None, "no data is named"),
        ("missing.jsonl", "no such file: missing.jsonl"),
        ("step://missing.jsonl", "no such file: .*missing.jsonl"),
        ("/nowhere/*.jsonl", "no file matches /nowhere/"),
        ("step://notes.txt", "notes.txt: data of this kind cannot be read"),
        ("step://.", "is a folder, but no saved dataset"),
        ("step://broken.parquet", "is no Parquet file"),
        ("step://broken.arrow", "is no Arrow file"),
        ("step://latin.csv", "latin.csv:1: not CSV in UTF-8"),
    ],
)
def test_unusable_data_is_one_clear_error(tmp_path: Path, data_path: str | None, message: str) -> None:
    for name in ("notes.txt", "broken.parquet", "broken.arrow"):
        (tmp_path / name).write_text("x")
    (tmp_path / "latin.csv").write_bytes("prompt\né\n".encode("latin-1"))
    with pytest.raises(UserError, match=message) as caught:
        rows(tmp_path, data_path)
    assert caught.value.exit_code == 2
    assert caught.value.where
    assert "data.train.data_path" in str(caught.value) or "latin.csv:" in str(caught.value)


def test_hub_id_without_a_network_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    paths.hub_is_offline.cache_clear()
    with pytest.raises(UserError, match=r"no dataset nobody/none \(small\), split few(.|\n)*cannot be reached"):
        rows(tmp_path, "nobody/none", subset="small", split="few")
    with pytest.raises(UserError, match=r"no dataset nvidia/HelpSteer3 \(preference\), split train"):
        rows(tmp_path, None, dataset_name="HelpSteer3")
    paths.hub_is_offline.cache_clear()


def test_sections_take_what_they_lack_from_the_default() -> None:
    default = {"prompt_key": "q", "data_path": "x", "split": None}
    data = {"default": default, "cache_dir": "c"}
    expected = {"prompt_key": "q", "data_path": "y", "split": "train", "cache_dir": "c"}
    assert data_section(data, {"data_path": "y", "prompt_key": None}, split="train") == expected
    assert data_section(data, {"split": "dev"}, split="validation")["split"] == "dev"
    assert data_section(data, None, split="validation") == {**expected, "data_path": "x", "split": "validation"}


def test_bad_rows_name_reasons_counts_and_first_places() -> None:
    bad = BadRows()
    bad.total = 100
    for line in (3, 5, 8, 13):
        bad.add("tie", f"a.jsonl:{line}")
    bad.add("missing key chosen", "a.jsonl:9")
    bad.stop_if_too_many(0.05, key="data.train")
    with pytest.raises(UserError) as caught:
        bad.stop_if_too_many(0.049, key="data.train")
    assert str(caught.value).splitlines()[:3] == [
        "error: data.train: 5 of 100 rows are bad: 5% where max_bad_rows allows 4.9%",
        "       4 × tie: a.jsonl:3, a.jsonl:5, a.jsonl:8, …",
        "       1 × missing key chosen: a.jsonl:9",
    ]
    assert bad.summary().startswith("5 of 100 rows left out\n4 × tie: ")
    bad.total = 5
    with pytest.raises(UserError, match="none of the 5 rows can be used"):
        bad.stop_if_too_many(1.0, key="data.train")


def test_data_without_rows_is_refused() -> None:
    with pytest.raises(UserError, match="the data holds no rows"):
        BadRows().stop_if_too_many(1.0, key="data.train")
