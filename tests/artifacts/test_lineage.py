"""Lineage: back to the sources and forward to the users, by name, record or path, with gaps shown as such."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from nemotron_launch.artifacts import lineage, record, registry, step_graph
from nemotron_launch.catalog import load_artifacts, load_steps
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import replace
from nemotron_launch.jobs.ledger import Ledger
from tests.artifacts.made import START, finished, ledger
from tests.conftest import Nemotron
from tests.jobs.rows import row

__all__ = ["ledger"]

DPO = "rl/nemo_rl/dpo"


@pytest.fixture
def chain(ledger: Ledger) -> Ledger:
    """rl_prep → sft → dpo → rlvr; dpo's start is named, rlvr's is a path."""
    finished(ledger, "data_prep/rl_prep", run_id="prep", ago=400)
    finished(ledger, "sft/megatron", "data.manifest_path=run:prep", run_id="sft", ago=300)
    dpo = finished(ledger, DPO, f"{START}=run:sft", run_id="dpo", ago=200)
    finished(ledger, "rl/nemo_rl/rlvr", f"{START}={dpo.output_dir}/checkpoints", run_id="rlvr", ago=100)
    return ledger


def makers(found: lineage.Lineage, node: str) -> set[str]:
    return {link.maker for link in found.sources(node)}


def test_the_whole_chain_is_found_from_either_end(chain: Ledger) -> None:
    for name in ("prep", "rlvr", "sft-tiny@1", "dpo-tiny"):
        found = lineage.of(chain, name)
        assert {"rl_prep-tiny@1", "sft-tiny@1", "dpo-tiny@1", "rlvr-tiny@1"} <= set(found.nodes), name
        assert makers(found, "dpo-tiny@1") >= {"sft-tiny@1"} and makers(found, "rlvr-tiny@1") >= {"dpo-tiny@1"}
        assert makers(found, "sft-tiny@1") >= {"rl_prep-tiny@1"}


def test_data_of_a_step_s_own_folder_is_each_step_s_own(chain: Ledger) -> None:
    found = lineage.of(chain, "rlvr")
    sources = [node.id for node in found.nodes.values() if node.kind == "source"]
    assert "steps/rl/nemo_rl/dpo/data/train.jsonl" in sources and "steps/rl/nemo_rl/rlvr/data/train.jsonl" in sources


def test_only_what_leads_to_it_or_comes_of_it_is_shown(chain: Ledger) -> None:
    finished(chain, DPO, f"{START}=run:sft", "output_dir=other", run_id="sibling")
    assert "other@1" not in lineage.of(chain, "dpo").nodes
    assert "other@1" in lineage.of(chain, "sft").nodes


def test_without_the_ledger_s_names_the_records_tell(chain: Ledger) -> None:
    """Runs that were submitted before names were kept: their records name the record beside what they read."""
    with chain.transaction() as execute:
        for name, version, data in execute("SELECT name, version, data FROM artifacts").fetchall():
            bare = json.dumps({**json.loads(data), "uses": []})
            execute("UPDATE artifacts SET data = ? WHERE name = ? AND version = ?", (bare, name, version))
    found = lineage.of(chain, "rlvr")
    assert makers(found, "rlvr-tiny@1") >= {"dpo-tiny@1"} and makers(found, "dpo-tiny@1") >= {"sft-tiny@1"}


def test_a_path_means_what_lay_there_when_it_was_used(ledger: Ledger) -> None:
    first = finished(ledger, run_id="sft-1", register=False)
    made = record.read(Path(first.output_dir))
    assert made
    for n, ago in ((1, 500), (2, 100)):
        run = replace(first, run_id=f"sft-{n}")
        registry._enter(ledger, [(run, replace(made, digest=f"d{n}", created=time.time() - ago))])
    path = f"{first.output_dir}/checkpoints/step_3"
    use = {"key": START, "type": "checkpoint_megatron", "text": path, "place": path}
    for name, ago in (("early", 250), ("late", 0)):
        ledger.add([row(name, step=DPO, created=time.time() - ago, state="running", uses=(use,), host=first.host)])
    assert makers(lineage.of(ledger, "early"), "early") == {"sft-tiny@1"}
    assert makers(lineage.of(ledger, "late"), "late") == {"sft-tiny@2"}


def test_runs_that_made_nothing_yet_are_users_too(chain: Ledger) -> None:
    use = {"key": START, "type": "checkpoint_megatron", "text": "run:dpo", "name": "dpo-tiny", "version": 1}
    chain.add([row("going", step="rl/nemo_rl/rlhf", state="running", uses=(use,))])
    found = lineage.of(chain, "dpo")
    assert [link.user for link in found.users("dpo-tiny@1")] == ["rlvr-tiny@1", "going"]
    assert found.nodes["going"].state == "running"


def test_makers_that_were_forgotten_are_shown_as_such(chain: Ledger) -> None:
    chain.remove(["sft"])  # the row
    with chain.transaction() as execute:
        execute("DELETE FROM artifacts WHERE run_id = 'prep'")
    found = lineage.of(chain, "rlvr")
    assert found.nodes["sft-tiny@1"].state == "forgotten"
    assert found.nodes["rl_prep-tiny@1"].kind == "forgotten"
    text = lineage.tree(found)
    assert "rl_prep-tiny@1  prepared_jsonl at data.manifest_path  (forgotten, run prep)" in text
    assert "sft-tiny@1" in text and "forgotten" in text
    assert "forgotten" in lineage.mermaid(found)
    assert lineage.of_run(chain, "never-was").nodes["never-was"].kind == "forgotten"


def test_a_circle_of_paths_ends(ledger: Ledger) -> None:
    one = finished(ledger, run_id="one", ago=300)
    use = {"key": START, "type": "checkpoint_megatron", "name": "b", "version": 1, "text": "artifact:b@1"}
    back = {**use, "name": "a"}
    entry = registry.of_run(ledger, "one")
    assert entry
    rows = [replace(one, run_id=name, artifact=name, uses=(uses,)) for name, uses in (("a", use), ("b", back))]
    ledger.add(rows)
    registry._enter(ledger, [(run, replace(entry.record, digest=run.run_id)) for run in rows])
    assert "(see above)" in lineage.tree(lineage.of(ledger, "a@1"))


def test_the_tree_reads_from_the_artifact_outwards(chain: Ledger) -> None:
    text = lineage.tree(lineage.of(chain, "dpo"))
    lines = text.splitlines()
    assert lines[0] == "dpo-tiny@1  rl/nemo_rl/dpo -c tiny  run dpo, finished"
    assert lines[2] == "made of" and "used by" in lines
    deeper = next(line for line in lines if "sft-tiny@1" in line), next(line for line in lines if "rl_prep" in line)
    assert [re.search(r"\w", line).start() for line in deeper] == [3, 6]  # type: ignore[union-attr]
    assert lines[-1].startswith("   └─ ") or lines[-1].startswith("└─ rlvr-tiny@1")


def test_mermaid_quotes_what_would_end_a_label(ledger: Ledger) -> None:
    hostile = 'a"]; click n0 "javascript:x'
    use = {"key": START, "type": "checkpoint_hf", "text": hostile, "place": ""}
    ledger.add([row("bad", state="failed", uses=(use,))])
    text = lineage.mermaid(lineage.of(ledger, "bad"))
    assert '"]; click' not in text and "#34;" in text
    assert text.startswith("flowchart LR\n")


def test_a_thousand_runs_are_no_matter(ledger: Ledger) -> None:
    first = finished(ledger, run_id="r0")
    entry = registry.of_run(ledger, "r0")
    assert entry
    runs = [
        replace(
            first,
            run_id=f"r{n}",
            ended=float(n),
            uses=({"key": START, "type": "checkpoint_megatron", "text": "x", "name": "sft-tiny", "version": n},),
        )
        for n in range(1, 1000)
    ]
    ledger.add(runs)
    registry._enter(ledger, [(run, replace(entry.record, digest=f"d{n}")) for n, run in enumerate(runs)])
    began = time.perf_counter()
    found = lineage.of(ledger, "r500")
    assert len(found.nodes) >= 1000
    assert len(lineage.tree(found).splitlines()) > 1000 and len(lineage.mermaid(found)) > 1000
    assert time.perf_counter() - began < 4  # 0.3 s on a quiet core


# Commands ----------------------------------------------------------------------------------------------------------


def test_the_commands_say_what_was_made_and_of_what(chain: Ledger, nemotron: Nemotron) -> None:
    listed = nemotron("artifacts", "list")
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    assert names == ["NAME", "rlvr-tiny@1", "dpo-tiny@1", "sft-tiny@1", "rl_prep-tiny@1"], listed.stderr
    data = json.loads(nemotron("artifacts", "list", "--type", "training_jsonl", "--json").stdout)
    assert [(one["name"], one["type"]) for one in data] == [("rl_prep-tiny", "prepared_jsonl")]
    shown = nemotron("artifacts", "show", "dpo-tiny").stdout
    for part in ("dpo-tiny@1", "step_3", "tokenizer  bytes", "num_layers 2", "(sft-tiny@1)", "artifact:dpo-tiny@1"):
        assert part in shown
    whole = json.loads(nemotron("artifacts", "show", "dpo", "--json").stdout)
    assert (whole["name"], whole["version"], whole["artifacts"][0]["type"]) == ("dpo-tiny", 1, "checkpoint_megatron")
    assert nemotron("artifacts", "lineage", "dpo").stdout == lineage.tree(lineage.of(chain, "dpo")) + "\n"
    assert json.loads(nemotron("artifacts", "lineage", "dpo", "--json").stdout)["root"] == "dpo-tiny@1"
    assert nemotron("artifacts", "lineage", "dpo", "--mermaid").stdout.startswith("flowchart LR")
    status = nemotron("jobs", "status", "dpo").stdout
    assert f"artifacts\n  dpo-tiny@1  checkpoint_megatron  {Path.cwd()}/output/rl/dpo-tiny/checkpoints/step_3" in status
    assert json.loads(nemotron("jobs", "status", "dpo", "--json").stdout)["artifacts"][0]["name"] == "dpo-tiny@1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "--type", "checkpoint_mega"], "there is no artifact type checkpoint_mega"),
        (["list", "--step", "nothing"], "there is no step nothing"),
        (["show", "nothing"], "there is no artifact and no run 'nothing'"),
        (["show", "sft-tiny@5"], "sft-tiny has no version 5"),
        (["lineage", "nothing@1"], "there is no artifact nothing"),
        (["lineage", "sw"], "sw is a sweep of 2 points"),
        (["show", "broken"], "broken is failed: it has made nothing yet"),
    ],
)
def test_bad_names_are_one_message(ledger: Ledger, nemotron: Nemotron, arguments: list[str], message: str) -> None:
    finished(ledger, run_id="sft")
    ledger.add([row("broken", state="failed"), *(row(f"sw.{n}", sweep="sw", point=n, state="failed") for n in (0, 1))])
    done = nemotron("artifacts", *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error")]) == 1


def test_an_empty_ledger_lists_nothing(ledger: Ledger, nemotron: Nemotron) -> None:
    done = nemotron("artifacts", "list")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "no run has made anything yet\n")


# Steps -------------------------------------------------------------------------------------------------------------


def test_the_graph_of_steps_follows_is_a_and_conversions(nemotron: Nemotron) -> None:
    graph = step_graph.step_graph(load_steps(), load_artifacts())
    edges = {(edge.maker, edge.user, edge.key) for edge in graph.edges}
    assert ("sft/megatron", DPO, START) in edges
    assert ("data_prep/rl_prep", DPO, "data.manifest_path") in edges
    assert ("data_prep/rl_prep", DPO, "data.train.data_path") not in edges  # its own type is asked for elsewhere
    assert ("sft/megatron", "convert/megatron_to_hf", "megatron_path") in edges
    assert graph.conversions("checkpoint_megatron") == [("checkpoint_hf", "convert/megatron_to_hf")]
    assert graph.conversions("checkpoint_lora") == []  # no step does it yet
    said = nemotron("steps", "graph").stdout
    assert "prepared_jsonl  (a training_jsonl)\n  made by       data_prep/rl_prep" in said
    data = json.loads(nemotron("steps", "graph", "--json").stdout)
    assert {(edge["maker"], edge["user"], edge["key"]) for edge in data["edges"]} == edges
    drawn = nemotron("steps", "graph", "--mermaid").stdout
    assert drawn.startswith("flowchart LR") and drawn.count("-. is a .->") == 1


def test_a_sweep_s_name_needs_a_point(ledger: Ledger) -> None:
    ledger.add([row(f"sw.{n}", sweep="sw", point=n, state="failed", created=1.0) for n in (0, 1)])
    with pytest.raises(UserError) as raised:
        lineage.of(ledger, "sw")
    assert raised.value.hint == "a point of it is, for example, sw.0"
