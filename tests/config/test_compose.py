"""Composing: files, layers, overrides, defaults, aliases; and where each value came from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemotron_launch.config.compose import Composed, compose
from nemotron_launch.config.tree import Source, from_plain
from nemotron_launch.errors import UserError

SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "defaults": {},
        "dpo": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "reference_policy_kl_penalty": {"type": "number", "default": 0.05},
                "steps": {"type": "integer", "default": 150},
                "warmup": {"type": "integer", "default": "${int:${div:${.steps},10}}"},
            },
        },
        "policy": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "model_name": {"type": ["string", "null"], "default": None},
                "tokenizer": {"type": ["string", "null"], "default": "${policy.model_name}"},
                "max_len": {"type": "integer"},
                "lr": {"type": ["number", "null"], "x-alias-of": "policy.megatron.lr"},
                "megatron": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "lr": {"type": "number", "default": 5e-6},
                        "min_lr": {"type": "number", "default": "${.lr}"},
                        "betas": {"type": "array", "items": {"type": "number"}, "default": [0.9, 0.98]},
                    },
                },
                "pretrained": {
                    "type": ["object", "null"],
                    "default": None,
                    "properties": {"path": {"type": "string"}, "format": {"type": "string", "default": "auto"}},
                },
            },
        },
        "env_vars": {"type": "object", "additionalProperties": {"type": "string"}},
        "names": {"type": "array", "items": {"type": "object", "properties": {"n": {"type": "integer", "default": 7}}}},
    },
}
Make = Callable[..., Composed]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    return tmp_path


@pytest.fixture
def make(folder: Path) -> Make:
    """Write files (name → text), compose the first of them."""

    def make(files: dict[str, str] | str, *overrides: str, schema: bool = True, **kwargs: Any) -> Composed:
        named = {"mine": files} if isinstance(files, str) else files
        for name, text in named.items():
            path = folder / f"{name}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        config = folder / f"{next(iter(named))}.yaml"
        return compose(config, overrides, schema=folder / "schema.json" if schema else None, env={}, **kwargs)

    return make


def refused(make: Make, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        make(*args, **kwargs)
    assert caught.value.exit_code == 2
    return str(caught.value)


# Files


def test_own_body_goes_over_its_defaults(make: Make) -> None:
    files = {
        "mine": "defaults: base\na: {x: 1}\nlist: [9]\n",
        "base": "a: {x: 0, y: 2}\nlist: [1, 2]\nz: 3\n",
    }
    assert make(files, schema=False).data == {"a": {"x": 1, "y": 2}, "list": [9], "z": 3}


def test_later_defaults_go_over_earlier_ones_and_each_brings_its_own_first(make: Make) -> None:
    files = {
        "mine": "defaults: [one, sub/two.yaml]\n",
        "one": "v: one\nonly: one\n",
        "sub/two": "defaults: three\nv: two\n",
        "sub/three": "v: three\nonly: three\n",
    }
    composed = make(files, schema=False)
    assert composed.data == {"v": "two", "only": "three"}
    assert [path.stem for path in composed.files] == ["mine", "one", "two", "three"]


def test_self_says_where_the_own_body_goes(make: Make) -> None:
    files = {"mine": "defaults: [_self_, base]\nv: mine\n", "base": "v: base\n"}
    assert make(files, schema=False).data == {"v": "base"}


def test_a_file_may_be_reached_by_two_ways(make: Make) -> None:
    files = {"mine": "defaults: [a, b]\n", "a": "defaults: c\n", "b": "defaults: c\n", "c": "v: 1\n"}
    assert make(files, schema=False).data == {"v": 1}


def test_override_true_replaces_a_section(make: Make) -> None:
    files = {"mine": "defaults: base\na:\n  _override_: true\n  x: 1\n", "base": "a: {y: 2, z: {w: 1}}\n"}
    assert make(files, schema=False).data == {"a": {"x": 1}}


def test_override_false_merges(make: Make) -> None:
    files = {"mine": "defaults: base\na: {_override_: false, x: 1}\n", "base": "a: {y: 2}\n"}
    assert make(files, schema=False).data == {"a": {"y": 2, "x": 1}}


def test_a_circle_of_defaults_names_its_files(make: Make) -> None:
    files = {"mine": "defaults: a\n", "a": "defaults: b\n", "b": "defaults: a\n"}
    assert refused(make, files) == "error: b.yaml: defaults in a circle: a.yaml → b.yaml → a.yaml"


def test_a_missing_default_is_said_with_its_line_and_what_there_is(make: Make) -> None:
    files = {"mine": "v: 1\ndefaults:\n- bse\n", "base": "v: 1\n"}
    text = refused(make, files)
    assert text.startswith("error: mine.yaml:3: defaults: there is no config bse in ")
    assert "did you mean base?" in text


@pytest.mark.parametrize("entry", ["[{a: b}]", "{a: b}", "3", "[_self_, _self_]", "['']"])
def test_other_forms_of_defaults_are_refused(make: Make, entry: str) -> None:
    assert refused(make, f"defaults: {entry}\n").startswith("error: mine.yaml:1: defaults: ")


def test_a_config_of_ones_own_builds_on_the_steps(make: Make, folder: Path) -> None:
    (folder / "step" / "config").mkdir(parents=True)
    (folder / "step" / "config" / "tiny.yaml").write_text("a: 1\nb: 1\n")
    step = folder / "step"
    composed = make("defaults: step://config/tiny\na: 2\n", schema=False, step_dir=step)
    assert composed.data == {"a": 2, "b": 1}
    text = refused(make, "defaults: tiny\n", schema=False, step_dir=step)
    assert text.endswith("the step's own is step://config/tiny")


def test_no_defaults_is_fine(make: Make) -> None:
    assert make("defaults: null\na: 1\n", schema=False).data == {"a": 1}


def test_a_missing_config_is_one_message(folder: Path) -> None:
    with pytest.raises(UserError, match="no such config file"):
        compose(folder / "nope.yaml")


# Overrides


@pytest.mark.parametrize(
    ("override", "data"),
    [
        ("a.x=2", {"a": {"x": 2, "y": [1, 2]}}),
        ("a.x=null", {"a": {"x": None, "y": [1, 2]}}),
        ("a.y=[3]", {"a": {"x": 1, "y": [3]}}),
        ("a.y.1=5", {"a": {"x": 1, "y": [1, 5]}}),
        ("a.y[0]=5", {"a": {"x": 1, "y": [5, 2]}}),
        ("a={x:7}", {"a": {"x": 7, "y": [1, 2]}}),
        ("a={_override_:true,x:7}", {"a": {"x": 7}}),
        ("+a.z=1", {"a": {"x": 1, "y": [1, 2], "z": 1}}),
        ("+b.c.d=1", {"a": {"x": 1, "y": [1, 2]}, "b": {"c": {"d": 1}}}),
        ("++a.x=3", {"a": {"x": 3, "y": [1, 2]}}),
        ("++b=3", {"a": {"x": 1, "y": [1, 2]}, "b": 3}),
        ("~a.x", {"a": {"y": [1, 2]}}),
        ("~a.x=1", {"a": {"y": [1, 2]}}),
        ("~a.y.0", {"a": {"x": 1, "y": [2]}}),
        ("~a", {}),
        ("a.x=${a.y}", {"a": {"x": [1, 2], "y": [1, 2]}}),
        ("a.x=", {"a": {"x": "", "y": [1, 2]}}),
    ],
)
def test_overrides_change_add_and_delete(make: Make, override: str, data: object) -> None:
    assert make("a: {x: 1, y: [1, 2]}\n", override, schema=False).data == data


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("a.xx=1", "unknown key a.xx\n       did you mean a.x?  (new keys: +a.xx=1)"),
        ("b=1", "unknown key b\n       (new keys: +b=1)"),
        ("a={zz:1}", "unknown key a.zz\n       (new keys: +a={zz:1})"),
        ("+a.x=2", "a.x is set already (mine.yaml:1)\n       change it with a.x=2"),
        ("~a.xx", "unknown key a.xx\n       did you mean a.x?"),
        ("~a.x=2", "a.x is 1 (mine.yaml:1), not 2; not deleted"),
        ("a.x.y=1", "a.x is 1 (mine.yaml:1), not a mapping: no place for a.x.y"),
        ("a.y.5=1", "a.y is a list of 2 (mine.yaml:1); there is no a.y.5\n       set the whole list: a.y=[…]"),
        ("+a.y.k.z=1", "a.y is a list of 2 (mine.yaml:1); there is no a.y.k.z\n       set the whole list: a.y=[…]"),
        ("defaults=x", "defaults: stands in a file only\n       choose a config with -c"),
    ],
)
def test_a_wrong_override_is_one_message(make: Make, override: str, text: str) -> None:
    assert refused(make, "a: {x: 1, y: [1, 2]}\n", override, schema=False) == f"error: command line: {text}"


def test_a_key_that_the_schema_knows_can_be_set_though_no_file_does(make: Make) -> None:
    assert make("{}", "dpo.steps=20").data["dpo"]["steps"] == 20
    assert make("{}", "+dpo.steps=20").data["dpo"]["steps"] == 20


def test_a_new_key_is_advised_only_where_it_would_be_taken(make: Make) -> None:
    assert (
        refused(make, "{}", "dpo.stepz=1")
        == "error: command line: unknown key dpo.stepz\n       did you mean dpo.steps?"
    )
    assert refused(make, "{}", "env_vars.X=y").endswith("(new keys: +env_vars.X=y)")
    assert make("{}", "+env_vars.X=y").data["env_vars"] == {"X": "y"}


def test_a_new_key_that_the_schema_does_not_know_is_refused(make: Make) -> None:
    assert refused(make, "{}", "+dpo.stepz=1").startswith("error: command line: unknown key dpo.stepz")


def test_a_deleted_key_falls_back_to_its_default(make: Make) -> None:
    assert make("dpo: {steps: 3}\n", "~dpo.steps").data["dpo"]["steps"] == 150


def test_all_wrong_overrides_are_said_together(make: Make) -> None:
    text = refused(make, "{}", "dpo.stepz=1", "polcy.model_name=x")
    assert text.splitlines()[0] == "error: command line: 2 problems"
    assert "did you mean policy.model_name?" in text


def test_the_later_override_wins(make: Make) -> None:
    assert make("{}", "dpo.steps=1", "dpo.steps=2").data["dpo"]["steps"] == 2


# Schema


def test_defaults_fill_what_nobody_set(make: Make) -> None:
    data = make("policy: {model_name: m}\ndpo: {steps: 50}\n").data
    assert data == {
        "dpo": {"reference_policy_kl_penalty": 0.05, "steps": 50, "warmup": 5},
        "policy": {
            "model_name": "m",
            "tokenizer": "m",
            "megatron": {"lr": 5e-6, "min_lr": 5e-6, "betas": [0.9, 0.98]},
            "pretrained": None,
        },
    }


def test_a_section_that_is_null_by_default_gets_its_defaults_once_it_is_given(make: Make) -> None:
    data = make("policy: {model_name: m}\n", "policy.pretrained.path=x").data
    assert data["policy"]["pretrained"] == {"path": "x", "format": "auto"}


def test_defaults_reach_into_lists(make: Make) -> None:
    assert make("policy: {model_name: m}\nnames: [{}, {n: 1}]\n").data["names"] == [{"n": 7}, {"n": 1}]


def test_a_default_of_a_section_goes_over_those_of_its_keys(folder: Path, make: Make) -> None:
    part = {"type": "object", "properties": {"a": {"default": 1}, "b": {"default": 2}, "c": {"default": 3}}}
    (folder / "part.json").write_text(json.dumps(part))
    schema = {"properties": {"p": {"$ref": "part.json", "default": {"a": 10, "b": 20}}}}
    (folder / "schema.json").write_text(json.dumps(schema))
    assert make("{}").data == {"p": {"a": 10, "b": 20, "c": 3}}
    assert make("p: {a: 100}\n").data == {"p": {"a": 100, "b": 20, "c": 3}}


def test_a_misspelt_key_is_said_with_file_line_and_suggestion(make: Make) -> None:
    files = {"mine": "defaults: base\n", "base": "policy: {model_name: m}\ndpo:\n  reference_policy_kl_penaltyy: 0.1\n"}
    assert refused(make, files) == (
        "error: base.yaml:3: unknown key dpo.reference_policy_kl_penaltyy\n"
        "       did you mean dpo.reference_policy_kl_penalty?"
    )


def test_all_problems_come_together_in_the_order_of_the_lines(make: Make) -> None:
    text = refused(make, "dpo:\n  steps: x\npolicy:\n  model_name: 3\n  max_lem: 5\n", "dpo.warmup=1.5")
    assert text.splitlines()[0] == "error: mine.yaml: 4 problems"
    assert [line.strip().split(": ")[0] for line in text.splitlines() if line.startswith("       m")] == [
        "mine.yaml:2",
        "mine.yaml:4",
        "mine.yaml:5",
    ]
    assert "command line: dpo.warmup must be a whole number, got the number 1.5" in text


def test_types_are_checked_after_interpolation(make: Make) -> None:
    assert (
        make("policy: {model_name: m}\ndpo: {steps: 8, warmup: '${mul:${dpo.steps},2}'}\n").data["dpo"]["warmup"] == 16
    )
    assert "dpo.warmup must be a whole number" in refused(
        make, "policy: {model_name: m}\ndpo: {steps: 8, warmup: '${policy.model_name}'}\n"
    )


def test_a_default_made_of_a_wrong_value_is_not_a_second_problem(make: Make) -> None:
    text = refused(make, "policy: {model_name: 5}\n")
    assert text.startswith("error: mine.yaml:1: policy.model_name must be text or null, got the number 5")


def test_a_missing_value_says_how_to_give_it(make: Make) -> None:
    assert refused(make, "policy:\n  model_name: ???\n") == (
        "error: mine.yaml:2: policy.model_name has no value yet\n       give it: policy.model_name=…"
    )
    assert make("policy:\n  model_name: ???\n", "policy.model_name=m").data["policy"]["model_name"] == "m"


def test_an_unset_environment_variable_is_said_with_its_line(make: Make) -> None:
    text = refused(make, "dpo: {}\npolicy:\n  model_name: ${oc.env:NO_SUCH}\n")
    assert text.startswith("error: mine.yaml:3: policy.model_name: the environment variable NO_SUCH is not set")


# Aliases


@pytest.mark.parametrize(
    ("files", "overrides", "lr"),
    [
        ("policy: {lr: 1.0e-3}\n", (), 1e-3),
        ("policy: {lr: 1.0e-3, megatron: {lr: 1.0e-3}}\n", (), 1e-3),
        ("policy: {megatron: {lr: 1.0e-3}}\n", ("policy.lr=1e-6",), 1e-6),
        ("policy: {lr: 1.0e-3}\n", ("policy.megatron.lr=1e-6",), 1e-6),
        ("policy: {lr: null, megatron: {lr: 1.0e-3}}\n", (), 1e-3),
        ("policy: {lr: 1.0e-3}\n", ("policy.lr=null",), 5e-6),
        ("dpo: {steps: 2}\npolicy: {lr: '${div:${dpo.steps},4}'}\n", (), 0.5),
        ({"mine": "defaults: base\npolicy: {lr: 1.0e-3}\n", "base": "policy: {megatron: {lr: 1}}\n"}, (), 1e-3),
        ({"mine": "defaults: base\npolicy: {megatron: {lr: 1}}\n", "base": "policy: {lr: 1.0e-3}\n"}, (), 1),
    ],
)
def test_an_alias_sets_its_key_from_the_same_layer_or_a_higher_one(
    make: Make, files: Any, overrides: tuple[str, ...], lr: float
) -> None:
    policy = make(files, *overrides, "policy.model_name=m").data["policy"]
    assert policy["megatron"]["lr"] == lr
    assert policy["megatron"]["min_lr"] == lr
    assert policy.get("lr") in (None, lr)


def test_both_names_with_different_values_in_one_layer_are_refused(make: Make) -> None:
    assert refused(make, "policy:\n  lr: 1.0e-3\n  megatron:\n    lr: 2.0e-3\n", "policy.model_name=m") == (
        "error: mine.yaml:2: policy.lr=0.001 and policy.megatron.lr=0.002 (mine.yaml:4) are one setting\n"
        "       give only one of them"
    )
    text = refused(make, "{}", "policy.model_name=m", "policy.lr=1", "policy.megatron.lr=2")
    assert text.startswith("error: command line: policy.lr=1 and policy.megatron.lr=2 (command line) are one setting")


# Sources and layers


def test_every_value_knows_where_it_was_written(make: Make) -> None:
    composed = make(
        {"mine": "defaults: base\ndpo:\n  steps: 3\n", "base": "policy:\n  model_name: m\n"}, "policy.max_len=8"
    )
    where = composed.sources.where
    assert where("dpo.steps") == "mine.yaml:3"
    assert where("policy.model_name") == "base.yaml:2"
    assert where("policy.max_len") == "command line"
    assert where("dpo.warmup") == "default"
    assert where("policy.nothing.there") == "base.yaml:1"


def test_a_layer_stands_between_file_and_command_line(make: Make) -> None:
    layer = from_plain({"dpo": {"steps": 5, "warmup": 1}}, Source("profile p", 4))
    composed = make("policy: {model_name: m}\ndpo: {steps: 3, warmup: 3}\n", "dpo.warmup=2", layers=[layer])
    assert (composed.data["dpo"]["steps"], composed.data["dpo"]["warmup"]) == (5, 2)
    assert composed.sources.where("dpo.steps") == "profile p:4"


def test_get_reads_a_dotted_key(make: Make) -> None:
    composed = make("a: {b: [{c: 1}], n: null}\n", schema=False)
    assert composed.get("a.b.0.c") == 1
    assert composed.get("a.n", 2) == 2
    assert composed.get("a.b.7.c") is None


def test_a_composed_config_composes_to_itself(make: Make, folder: Path) -> None:
    from nemotron_launch.config.yaml_files import dump

    composed = make("policy: {model_name: m, lr: 1.0e-3}\n", "dpo.steps=30")
    (folder / "again.yaml").write_text(dump(composed.data))
    assert compose(folder / "again.yaml", schema=folder / "schema.json", env={}).data == composed.data


def test_a_changed_file_is_read_again(make: Make, folder: Path) -> None:
    import os

    assert make("a: 1\n", schema=False).data == {"a": 1}
    (folder / "mine.yaml").write_text("a: 2\n")
    os.utime(folder / "mine.yaml", ns=(1, 1))
    assert compose(folder / "mine.yaml", env={}).data == {"a": 2}
