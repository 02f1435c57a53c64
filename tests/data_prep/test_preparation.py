"""A whole preparation: what is kept and what is not, the same whatever the number of workers, told in the manifest."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from nemotron_launch.data_prep import shards, sources
from nemotron_launch.errors import UserError
from nemotron_launch.trainer.data.preference import load_preferences
from nemotron_launch.trainer.data.prompts import load_prompts
from nemotron_launch.trainer.data.sft import load_sft
from nemotron_launch.trainer.tokenizer import load_tokenizer
from tests.data_prep.preparations import STEP, adds_up, contents, rows_of, run, write_blend, write_rows

STEPS = STEP.parents[1]


def pair(i: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"number {i} of many, is it even", "chosen": f"yes {i}", "rejected": f"no {i}", **more}


def pairs(*numbers: int) -> list[dict[str, Any]]:
    return [pair(i) for i in numbers]


def test_every_row_is_kept_or_has_a_reason_with_its_line(tmp_path: Path) -> None:
    rows: list[Any] = pairs(*range(40))
    rows[7:7] = ["", "{torn", pair(0, rejected="yes 0"), "[1]", {"prompt": "p"}]
    rows += [pair(3, prompt="NUMBER 3  of many, is it even"), pair(1)]
    write_rows(tmp_path / "a.jsonl", rows)
    write_rows(tmp_path / "v.jsonl", [pair(5, chosen="yes!")])
    blend = write_blend(tmp_path, [{"path": "a.jsonl", "name": "mine"}, {"path": "v.jsonl", "use": "validation"}])
    manifest = run(blend, tmp_path / "out", "target=dpo", "max_bad_rows=0.2")

    counts = manifest["counts"]
    assert (counts["read"], counts["train"], counts["validation"]) == (47, 39, 1)
    assert counts["dropped"] == {"bad_row": 4, "exact_duplicate": 2, "leakage": 1}
    assert all(map(adds_up, [counts, *(source["counts"] for source in manifest["sources"])]))
    kept = {row["prompt"] for row in rows_of(tmp_path / "out")}
    assert kept == {pair(i)["prompt"] for i in range(40) if i != 5}
    bad = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").open()]
    a = tmp_path / "a.jsonl"
    assert [(row["place"], row["source"], row["reason"]) for row in bad] == [
        (f"{a}:9", "mine", "not valid JSON"),  # line 8 is blank
        (f"{a}:10", "mine", "chosen equals rejected"),
        (f"{a}:11", "mine", "not a JSON object"),
        (f"{a}:12", "mine", "missing key chosen"),
    ]
    assert bad[0]["row"] == "{torn"
    dropped = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").open()]
    assert dropped == [
        {"place": f"{a}:6", "reason": "leakage", "of": f"{tmp_path / 'v.jsonl'}:1"},
        {"place": f"{a}:46", "reason": "exact_duplicate", "of": f"{a}:4"},
        {"place": f"{a}:47", "reason": "exact_duplicate", "of": f"{a}:2"},
    ]


def test_rows_that_only_read_alike_are_told_apart(tmp_path: Path) -> None:
    texts = [("1", "2", "3 4"), ("1", "2 3", "4"), ("1 2", "3", "4"), ("1", "3 4", "2")]
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in texts]
    write_rows(tmp_path / "a.jsonl", rows)
    write_rows(tmp_path / "v.jsonl", pairs(1))
    blend = write_blend(tmp_path, [{"path": "a.jsonl"}, {"path": "v.jsonl", "use": "validation"}])
    manifest = run(blend, tmp_path / "out", "target=dpo", "dedup.near=false")
    assert (manifest["counts"]["train"], manifest["counts"]["dropped"]) == (4, {})


def test_manifest_names_shards_and_sources_with_their_hashes(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", pairs(*range(100)))
    blend = write_blend(tmp_path, [{"path": "a.jsonl"}])
    manifest = run(blend, tmp_path / "out", "target=dpo", "num_shards_per_split=4", "validation_size=0.1")
    assert [shard["path"] for shard in manifest["train"]] == [f"train-{i:05d}-of-00004.jsonl" for i in range(4)]
    assert [shard["rows"] for shard in manifest["train"]] == [22, 23, 22, 23] or (
        sum(shard["rows"] for shard in manifest["train"]) == 90
        and all(abs(shard["rows"] - 22.5) <= 2 for shard in manifest["train"])
    )
    assert sum(shard["rows"] for shard in manifest["validation"]) == 10
    for shard in manifest["train"] + manifest["validation"]:
        data = (tmp_path / "out" / shard["path"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
        assert data.count(b"\n") == shard["rows"]
    (file,) = manifest["sources"][0]["files"]
    assert file["sha256"] == hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest()
    assert manifest["target"] == "dpo"


def test_bytes_are_the_same_for_any_workers_and_any_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Any] = [pair(i, note="x" * (i % 97)) for i in range(700)]
    rows[300:300] = [*pairs(5, 6), "torn", pair(9, prompt="ein Prompt mit Ü und 题目")]
    write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(pair(9000)).encode() + b"\r\n\n" + b'{"prompt": 1}')
    write_rows(tmp_path / "c.jsonl", pairs(*range(650, 800)))
    files = [{"path": "a.jsonl", "weight": 1.5}, {"path": "[bc].jsonl", "weight": 0.4}]
    blend = write_blend(tmp_path, files)
    settings = [
        "target=dpo",
        "max_bad_rows=0.1",
        "validation_size=20",
        "num_shards_per_split=3",
        "tokenizer.name=bytes",
    ]
    run(blend, tmp_path / "one", *settings)
    expected = contents(tmp_path / "one")
    assert len(expected) == 9
    for name, unit, workers in (("two", 16 << 20, 2), ("cut", 1000, 1), ("both", 3001, 2)):
        monkeypatch.setattr(sources, "UNIT_BYTES", unit)
        monkeypatch.setattr(shards, "RANGE_BYTES", unit)
        run(blend, tmp_path / name, *settings, f"num_workers={workers}")
        assert contents(tmp_path / name) == expected


def test_order_and_split_follow_the_seed(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", pairs(*range(200)))
    blend = write_blend(tmp_path, [{"path": "a.jsonl"}])
    orders = []
    for seed in (1, 2):
        run(blend, tmp_path / str(seed), "target=dpo", f"seed={seed}", "validation_size=0.25")
        orders.append(
            [[row["chosen"] for row in rows_of(tmp_path / str(seed), split)] for split in ("train", "validation")]
        )
    assert orders[0] != orders[1]
    for train, validation in orders:
        assert (len(train), len(validation)) == (150, 50)
        assert train != sorted(train, key=lambda text: int(text.split()[1]))


def test_rows_of_a_prompt_go_to_one_side_together(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [pair(i // 4, chosen=f"yes {i}") for i in range(400)])
    blend = write_blend(tmp_path, [{"path": "a.jsonl"}])
    manifest = run(blend, tmp_path / "out", "target=dpo", "validation_size=50", "dedup.near=false")
    assert manifest["counts"]["dropped"] == {}
    assert manifest["counts"]["validation"] == 48  # twelve whole prompts
    sides = [{row["prompt"] for row in rows_of(tmp_path / "out", split)} for split in ("train", "validation")]
    assert not sides[0] & sides[1]


@pytest.mark.parametrize(("weight", "train"), [(0.25, 25), (1, 100), (2, 200), (2.5, 250)])
def test_weight_says_how_often_rows_are_taken(tmp_path: Path, weight: float, train: int) -> None:
    write_rows(tmp_path / "a.jsonl", pairs(*range(100)))
    blend = write_blend(tmp_path, [{"path": "a.jsonl", "weight": weight}])
    manifest = run(blend, tmp_path / "out", "target=dpo")
    assert manifest["counts"]["train"] == train and adds_up(manifest["counts"])
    counted = [row["prompt"] for row in rows_of(tmp_path / "out")]
    assert len(set(counted)) == min(train, 100)
    assert {counted.count(prompt) for prompt in counted} <= {int(weight), int(weight) + 1}


def test_limits_and_max_rows_are_exact(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ["", *pairs(*range(100))])
    write_rows(tmp_path / "b.jsonl", pairs(*range(100, 200)))
    blend = write_blend(tmp_path, [{"path": ["a.jsonl", "b.jsonl"], "limit": 130}])
    manifest = run(blend, tmp_path / "out", "target=dpo", "max_rows=70")
    assert (manifest["counts"]["read"], manifest["counts"]["train"]) == (130, 70)
    assert manifest["counts"]["dropped"] == {"max_rows": 60}
    assert {row["chosen"] for row in rows_of(tmp_path / "out")} < {f"yes {i}" for i in range(130)}


def test_files_of_other_kinds_give_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import zstandard
    from pyarrow import parquet

    rows = pairs(*range(30))
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = pyarrow.Table.from_pylist(rows)
    (tmp_path / "a.jsonl").write_bytes(text)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(text))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text(
        "prompt,chosen,rejected\n" + "".join(f'"{r["prompt"]}",{r["chosen"]},{r["rejected"]}\n' for r in rows)
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    for kind in ("jsonl", "jsonl.gz", "jsonl.zst", "json", "csv", "parquet", "arrow"):
        folder = tmp_path / kind
        run(write_blend(folder, [{"path": f"../a.{kind}", "limit": 20}]), folder / "out", "target=dpo")
        assert sorted(map(str, rows_of(folder / "out"))) == sorted(map(str, rows[:20]))


def test_zstd_holds_the_same_rows(tmp_path: Path) -> None:
    import zstandard

    write_rows(tmp_path / "a.jsonl", pairs(*range(500)))
    blend = write_blend(tmp_path, [{"path": "a.jsonl"}])
    run(blend, tmp_path / "plain", "target=dpo")
    manifest = run(blend, tmp_path / "zstd", "target=dpo", "compression=zstd")
    (shard,) = manifest["train"]
    assert shard["path"] == "train-00000-of-00001.jsonl.zst"
    packed = (tmp_path / "zstd" / shard["path"]).read_bytes()
    assert len(packed) < (tmp_path / "plain/train-00000-of-00001.jsonl").stat().st_size / 3
    plain = zstandard.ZstdDecompressor().decompressobj().decompress(packed)
    assert plain == (tmp_path / "plain/train-00000-of-00001.jsonl").read_bytes()


def test_too_many_bad_rows_publish_nothing_and_are_all_in_the_quarantine(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [*pairs(*range(8)), {"prompt": "p"}, "torn"])
    with pytest.raises(UserError) as refusal:
        run(write_blend(tmp_path, [{"path": "a.jsonl"}]), tmp_path / "out", "target=dpo", "max_bad_rows=0.1")
    text = str(refusal.value)
    assert "2 of 10 rows are bad: 20% where max_bad_rows allows 10%" in text
    assert "1 × missing key chosen" in text and f"the first one is {tmp_path / 'a.jsonl'}:9" in text
    assert sorted(contents(tmp_path / "out")) == ["quarantine.jsonl"]
    assert (tmp_path / "out/quarantine.jsonl").read_text().count("\n") == 2
    manifest = run(write_blend(tmp_path, [{"path": "a.jsonl"}]), tmp_path / "out", "target=dpo", "max_bad_rows=0.2")
    assert (manifest["counts"]["train"], manifest["counts"]["dropped"]) == (8, {"bad_row": 2})


def test_nothing_left_is_said_with_the_reasons(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", pairs(1, 1))
    write_rows(tmp_path / "v.jsonl", pairs(1))
    blend = write_blend(tmp_path, [{"path": "a.jsonl"}, {"path": "v.jsonl", "use": "validation"}])
    with pytest.raises(UserError, match="no training row is left") as refusal:
        run(blend, tmp_path / "out", "target=dpo")
    assert "1 × leakage" in str(refusal.value) and "1 × exact duplicate" in str(refusal.value)
    write_rows(tmp_path / "a.jsonl", [])
    with pytest.raises(UserError, match="hold no rows"):
        run(write_blend(tmp_path, [{"path": "a.jsonl"}]), tmp_path / "out", "target=dpo")


def test_leaks_are_reported_or_dropped(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", pairs(*range(20)))
    write_rows(tmp_path / "v.jsonl", [pair(3, chosen="x"), pair(4, prompt="Number 4 of many,  is it even", chosen="y")])
    blend = write_blend(tmp_path, [{"path": "a.jsonl"}, {"path": "v.jsonl", "use": "validation"}])
    for action, train in (("drop", 18), ("report", 20)):
        manifest = run(blend, tmp_path / action, "target=dpo", f"leakage={action}")
        assert manifest["leakage"] == {"action": action, "exact": 2, "near": 0}
        assert manifest["counts"]["train"] == train
    manifest = run(blend, tmp_path / "off", "target=dpo", "leakage=off")
    assert (manifest["leakage"]["exact"], manifest["counts"]["train"]) == (0, 20)


def test_overlong_rows_are_left_out_and_lengths_told(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [*pairs(*range(9)), pair(9, rejected="no " * 100)])
    blend = write_blend(tmp_path, [{"path": "a.jsonl"}])
    manifest = run(blend, tmp_path / "out", "target=dpo", "tokenizer.name=bytes", "max_length=100")
    assert manifest["counts"]["dropped"] == {"too_long": 1}
    # 28 bytes of prompt, 300 of the longer answer, and its end
    assert (manifest["lengths"]["read"]["max"], manifest["lengths"]["read"]["over_max_length"]) == (329, 1)
    assert manifest["lengths"]["train"]["max"] == 28 + len("yes 0") + 1
    with pytest.raises(UserError, match="no tokenizer is named"):
        run(blend, tmp_path / "other", "target=dpo", "max_length=100")


def test_a_finished_preparation_is_left_alone_until_its_data_change(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", pairs(*range(20)))
    blend = write_blend(tmp_path, [{"path": "a.jsonl"}])
    run(blend, tmp_path / "out", "target=dpo", "num_shards_per_split=2")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.json*")}
    run(blend, tmp_path / "out", "target=dpo", "num_shards_per_split=2")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    write_rows(file, pairs(*range(30)))
    os.utime(file, ns=(0, 0))
    manifest = run(blend, tmp_path / "out", "target=dpo")
    assert manifest["counts"]["train"] == 30
    assert [path.name for path in (tmp_path / "out").glob("train-*")] == ["train-00000-of-00001.jsonl"]


@pytest.mark.parametrize(
    ("target", "step"), [("dpo", "rl/nemo_rl/dpo"), ("rlvr", "rl/nemo_rl/rlvr"), ("sft", "sft/megatron")]
)
def test_tiny_blend_makes_the_rows_that_the_step_s_tiny_config_trains_on(
    tmp_path: Path, target: str, step: str
) -> None:
    blend = STEP / f"data/blend-{target}.yaml"
    manifest = run(blend, tmp_path / "out", f"target={target}", "dedup.near=false", "max_bad_rows=0.05")
    assert manifest["counts"]["dropped"]["leakage"] == 1 and manifest["counts"]["dropped"]["bad_row"] >= 2
    assert adds_up(manifest["counts"])
    tokenizer = load_tokenizer({"name": "bytes"}, None)
    load: Any = {"dpo": load_preferences, "rlvr": load_prompts, "sft": load_sft}[target]
    for split in ("train", "validation"):
        own, _ = load({"data_path": str(STEPS / step / f"data/{split}.jsonl")}, tokenizer=tokenizer, max_length=64)
        made, _ = load({"data_path": str(tmp_path / f"out/{split}-*.jsonl")}, tokenizer=tokenizer, max_length=64)
        assert len(made) == len(own)
        assert sorted(map(told, made)) == sorted(map(told, own))


def told(example: Any) -> str:
    """What a step trains on, as text."""
    if hasattr(example, "chosen_ids"):
        return str((example.chosen_ids.tolist(), example.rejected_ids.tolist()))
    return str((example.ids.tolist(), getattr(example, "row", {}).get("expected_answer")))


GSM8K = Path(os.environ.get("NEMOTRON_TEST_GSM8K", STEPS.parent / "../shared/data/gsm8k"))


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"no folder {GSM8K}; NEMOTRON_TEST_GSM8K names another")
def test_gsm8k_is_kept_but_for_what_repeats(tmp_path: Path) -> None:
    files = {name: str((GSM8K / f"{name}.jsonl").resolve()) for name in ("train", "test")}
    given = [
        {"path": files["train"], "environment": "math"},
        {"path": files["test"], "environment": "math", "use": "validation"},
    ]
    manifest = run(write_blend(tmp_path, given), tmp_path / "out", "target=rlvr")
    counts = manifest["counts"]
    assert counts["read"] == 7473 + 1319 and adds_up(counts)  # its README says how many
    assert counts["validation"] == 1319
    assert 7400 < counts["train"] <= 7473
    assert {row["env_name"] for row in rows_of(tmp_path / "out")} == {"math"}
