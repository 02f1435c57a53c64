"""Profiles: where they are found, what they extend, what their values may be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_launch.config.tree import find, to_plain
from nemotron_launch.config.yaml_files import dump
from nemotron_launch.errors import UserError
from nemotron_launch.job import Secret
from nemotron_launch.profile_files import executor_schemas, layers, places
from nemotron_launch.profile_files import find as find_profile
from nemotron_launch.profiles import Profile, _merged, list_profiles, load_profile, seconds
from nemotron_launch.resources import profiles_dir
from nemotron_launch.secret_names import is_secret_name
from tests.profile_files import write
from tests.step_trees import REPOSITORY

SHIPPED = sorted(path.stem for path in (REPOSITORY / "profiles").glob("*.yaml"))
SLURM = "executor: slurm\nremote_job_dir: /jobs\n"
LEPTON = "executor: lepton\nremote_job_dir: /jobs\nresource_shape: gpu.8xh100-80gb\n"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with no env.toml above it; the test's own profiles go into its `profiles/`."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "pyproject.toml").touch()
    monkeypatch.chdir(folder)
    return folder


def load(work: Path, text: str, **env: str) -> Profile:
    write(work / "profiles", p=text)
    return load_profile("p", env=env)


def message(work: Path, text: str, **env: str) -> str:
    with pytest.raises(UserError) as caught:
        load(work, text, **env)
    return str(caught.value)


# The shipped ones ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_loads_with_nothing_in_the_environment(work: Path, name: str) -> None:
    profile = load_profile(name, env={})
    assert not profile.warnings
    assert not profile.from_cwd
    assert profile.data["description"]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_keeps_to_the_schema_as_editors_read_it(name: str) -> None:
    schema = json.loads((REPOSITORY / "profiles" / "schema.json").read_text())
    body = yaml.safe_load((REPOSITORY / "profiles" / f"{name}.yaml").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(body)


def test_the_documented_names_are_there() -> None:
    wanted = {f"{executor}_rl_nemo_rl_{step}" for executor in ("slurm", "lepton") for step in ("dpo", "rlvr", "rlhf")}
    assert wanted | {"local", "slurm", "slurm_ssh", "lepton"} <= set(SHIPPED)


def test_the_step_profiles_follow_ones_own_base(work: Path) -> None:
    write(work / "profiles", slurm="extends: slurm\naccount: mine\ntunnel: {type: ssh, host: cluster}\n")
    profile = load_profile("slurm_rl_nemo_rl_dpo", env={})
    assert (profile.data["account"], profile.data["tunnel"]["host"]) == ("mine", "cluster")
    assert profile.data["image"] == "nvcr.io/nvidia/nemo-rl:v0.6.0"
    assert profile.from_cwd  # a file of the working directory took part
    assert profile.files[1] == work / "profiles" / "slurm.yaml"


def test_the_users_variables_fill_the_placeholders(work: Path) -> None:
    data = load_profile("slurm_rl_nemo_rl_dpo", env={"SLURM_ACCOUNT": "a", "NEMO_RUN_DIR": "/fast/ada"}).data
    assert (data["account"], data["env"]["RL_OUTPUT_DIR"]) == ("a", "/fast/ada/output/rl")


@pytest.mark.parametrize("executor", ["local", "slurm", "lepton"])
def test_every_key_is_described(executor: str) -> None:
    def undescribed(part: Any, path: str = "") -> list[str]:
        below = part.get("properties", {}) if isinstance(part, dict) else {}
        found = [f"{path}{key}" for key, sub in below.items() if not sub.get("description") and "const" not in sub]
        return found + [name for key, sub in below.items() for name in undescribed(sub, f"{path}{key}.")]

    assert undescribed(executor_schemas()[executor].tree) == []


# Finding -------------------------------------------------------------------------------------------------------------


def test_the_places_are_looked_into_in_their_order(work: Path, tmp_path: Path) -> None:
    given = write(tmp_path / "given", p="executor: local\ndescription: given\n")
    write(work / "profiles", p="executor: local\ndescription: here\n")
    home = write(tmp_path / "home" / ".config" / "nemotron" / "profiles", p="executor: local\ndescription: home\n")
    (work / "env.toml").write_text('[p]\nexecutor = "local"\ndescription = "toml"\n')
    env = {"HOME": str(tmp_path / "home")}

    def found() -> str:
        return str(load_profile("p", profiles_path=given, env=env).data["description"])

    seen = [found()]
    for path in (given, work / "profiles", home):
        (path / "p.yaml").unlink()
        seen.append(found())
    assert seen == ["given", "here", "home", "toml"]


def test_a_profile_can_be_given_as_a_file(work: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "given", mine="executor: local\n") / "mine.yaml"
    assert load_profile(str(path), env={}).name == "mine"
    assert load_profile("mine", profiles_path=path, env={}).file == path
    assert load_profile("local", profiles_path=path, env={}).file == profiles_dir() / "local.yaml"


def test_a_toml_file_can_be_given(work: Path, tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text('[mine]\nexecutor = "local"\n')
    assert load_profile("mine", profiles_path=path, env={}).file == path


def test_a_profile_that_is_nowhere_is_said_with_the_nearest_and_the_places(work: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_profile("slurm_rl_nemo_rl_dop", env={"HOME": "/nowhere"})
    lines = str(caught.value).splitlines()
    assert lines[0] == "error: there is no profile slurm_rl_nemo_rl_dop"
    assert lines[1].startswith("       did you mean slurm_rl_nemo_rl_dpo or ")
    assert lines[2].startswith("       looked into profiles, /nowhere/.config/nemotron/profiles, ")


def test_a_place_that_does_not_exist_is_said(work: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder or file of profiles"):
        load_profile("p", profiles_path=Path("gone"), env={})
    with pytest.raises(UserError, match="there is no profile file ./gone.yaml"):
        load_profile("./gone.yaml", env={})


def test_the_list_has_every_profile_once_and_resolves_nothing(work: Path) -> None:
    write(work / "profiles", slurm="extends: slurm\ndescription: mine\naccount: ${oc.env:NOWHERE}\n", bad="a: [")
    entries = {entry.name: entry for entry in list_profiles(env={})}
    assert entries["slurm"].description == "mine"
    assert (entries["slurm"].executor, entries["slurm"].shipped) == ("slurm", False)
    assert entries["bad"].problem.startswith("profiles/bad.yaml:2: not YAML")
    assert entries["lepton"].shipped


# Extending -----------------------------------------------------------------------------------------------------------


def test_a_list_of_parents_is_merged_left_to_right_and_the_profile_last(work: Path) -> None:
    write(
        work / "profiles",
        a=SLURM + "account: a\nqos: a\nmem: 1\nmounts: [/a:/a]\nenv: {A: 1, B: 1}\n",
        b="account: b\nqos: b\nmounts: [/b:/b]\nenv: {B: 2}\n",
    )
    data = load(work, "extends: [a, b]\naccount: p\nenv: {C: 3}\n").data
    assert (data["account"], data["qos"], data["mem"]) == ("p", "b", "1")
    assert [mount["source"] for mount in data["mounts"]] == ["/b"]  # lists replace
    assert data["env"] == {"A": "1", "B": "2", "C": "3"}  # mappings merge


def test_a_parent_that_two_share_counts_once(work: Path) -> None:
    write(
        work / "profiles", base=SLURM + "account: base\n", a="extends: base\naccount: a\n", b="extends: base\nqos: b\n"
    )
    assert load(work, "extends: [a, b]\n").data["account"] == "a"


def test_the_same_name_means_the_next_one(work: Path, tmp_path: Path) -> None:
    write(work / "profiles", slurm="extends: slurm\nqos: mine\n")
    data = load_profile("slurm", env={}).data
    assert (data["qos"], data["account"]) == ("mine", "your_account")
    assert "extends names the profile itself, and there is no other p after it" in message(work, "extends: p\n")


def test_a_circle_is_named(work: Path) -> None:
    write(work / "profiles", a="extends: b\n", b="extends: [local, p]\n")
    said = message(work, "extends: a\n")
    assert said.startswith("error: profiles/b.yaml:1: extends goes in a circle: p → a → b → p\n")
    assert "b is profiles/b.yaml" in said


def test_a_parent_that_is_nowhere_is_said_with_its_line(work: Path) -> None:
    said = message(work, "description: x\nextends: [local, slrum]\n")
    assert said.startswith("error: profiles/p.yaml:2: there is no profile slrum\n       did you mean slurm")


def test_secrets_of_parents_add_up(work: Path) -> None:
    write(work / "profiles", a=SLURM + "secrets: [A]\n", b="secrets: {B: {env: MY_B}}\n")
    found = load(work, "extends: [a, b]\nsecrets: [C]\n").secrets
    assert found == (Secret("A", source="A"), Secret("B", source="MY_B"), Secret("C", source="C"))


def test_a_mapping_can_replace_its_parents(work: Path) -> None:
    write(work / "profiles", a=SLURM + "env: {A: 1}\n")
    assert load(work, "extends: a\nenv: {_override_: true, B: 1}\n").data["env"] == {"B": "1"}


values = st.recursive(
    st.one_of(st.integers(), st.text(max_size=3), st.none(), st.lists(st.integers(), max_size=2)),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)
bodies = st.dictionaries(st.sampled_from(["x", "y", "z"]), values, max_size=3)


def plain_merge(base: Any, top: Any) -> Any:
    """What `extends` promises, said again in four lines."""
    if not isinstance(base, dict) or not isinstance(top, dict):
        return top
    return {**base, **{key: plain_merge(base[key], item) if key in base else item for key, item in top.items()}}


@settings(deadline=None)
@given(first=bodies, second=bodies, own=bodies)
def test_extends_merges_any_bodies_left_to_right(
    tmp_path_factory: pytest.TempPathFactory, first: Any, second: Any, own: Any
) -> None:
    folder = tmp_path_factory.mktemp("profiles")
    write(folder, a=dump(first), b=dump(second), p=dump({"extends": ["a", "b"], **own}))
    looked_into = places(folder, {})
    merged = to_plain(_merged(layers(find_profile("p", looked_into), looked_into)))
    assert merged == plain_merge(plain_merge(first, second), own)


hostile = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"), min_size=1).map(
    lambda text: text.replace("${", "$ {")
)


@settings(deadline=None)
@given(text=hostile)
def test_any_text_arrives_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("profiles")
    body = {"executor": "slurm", "remote_job_dir": "/" + text, "account": text, "setup": [text], "env": {"A": text}}
    write(folder, p=dump(body))
    data = load_profile("p", profiles_path=folder, env={}).data
    # A run of backslashes halves only before ${, as in OmegaConf, and there is none here.
    assert (data["remote_job_dir"], data["account"]) == ("/" + text, text)
    assert (data["setup"], data["env"]) == ([text], {"A": text})


@settings(deadline=None)
@given(text=st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"), min_size=1))
def test_any_text_of_the_environment_arrives_as_it_is(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("profiles")
    write(folder, p=SLURM + "env: {A: '${oc.env:SOME}'}\n")
    assert load_profile("p", profiles_path=folder, env={"SOME": text}).data["env"] == {"A": text}


# Values --------------------------------------------------------------------------------------------------------------


def test_other_names_of_a_key_are_that_key(work: Path) -> None:
    data = load(work, SLURM + "env_vars: {A: 1}\nstartup_commands: [x]\ncontainer_image: i\n").data
    assert (data["env"], data["setup"], data["image"]) == ({"A": "1"}, ["x"], "i")
    assert load(work, LEPTON + "retries: 2\n").data["max_restarts"] == 2
    said = message(work, SLURM + "env: {}\nenv_vars: {}\n")
    assert said == "error: profiles/p.yaml:4: env and env_vars are one setting\n       give only one of them"


def test_a_childs_other_name_goes_over_its_parents(work: Path) -> None:
    write(work / "profiles", a=SLURM + "env: {A: 1, B: 1}\n")
    assert load(work, "extends: a\nenv_vars: {B: 2}\n").data["env"] == {"A": "1", "B": "2"}


def test_values_refer_to_the_environment_and_to_each_other(work: Path) -> None:
    data = load(work, SLURM + "account: ${oc.env:A,b}\nenv: {X: '${remote_job_dir}/${account}', Y: '${.X}'}\n").data
    assert data["env"] == {"X": "/jobs/b", "Y": "/jobs/b"}


def test_a_variables_text_becomes_the_number_that_its_key_takes(work: Path) -> None:
    text = SLURM + "nodes: ${oc.env:N}\nexclusive: ${oc.env:E}\nqos: ${oc.env:N}\nenv: {A: '${oc.env:N}'}\n"
    data = load(work, text, N="2", E="true").data
    assert (data["nodes"], data["exclusive"], data["qos"], data["env"]["A"]) == (2, True, "2", "2")
    assert "nodes must be a whole number or null, got the text 'two'" in message(work, text, N="two", E="true")


def test_environment_variables_are_text(work: Path) -> None:
    data = load(work, SLURM + "env: {A: 1, B: true, C: 1.5, D: '', E: 04:00}\n").data
    assert data["env"] == {"A": "1", "B": "true", "C": "1.5", "D": "", "E": "04:00"}


def test_null_takes_a_parents_variable_away(work: Path) -> None:
    write(work / "profiles", a=SLURM + "env: {A: 1, B: 1}\n")
    assert load(work, "extends: a\nenv: {A: null}\n").data["env"] == {"B": "1"}


@pytest.mark.parametrize(
    ("mount", "expected"),
    [
        ("/a:/b", {"source": "/a", "target": "/b", "read_only": False, "volume": ""}),
        ("/a:/b:ro", {"source": "/a", "target": "/b", "read_only": True, "volume": ""}),
        ("/a:/b:rw", {"source": "/a", "target": "/b", "read_only": False, "volume": ""}),
        (
            "{path: /a, mount_path: /b, read_only: true}",
            {"source": "/a", "target": "/b", "read_only": True, "volume": ""},
        ),
    ],
)
def test_both_forms_of_a_mount_become_one(work: Path, mount: str, expected: dict[str, Any]) -> None:
    assert load(work, SLURM + f"mounts:\n  - {mount}\n").data["mounts"] == [expected]


def test_a_lepton_mount_names_its_volume(work: Path) -> None:
    mounts = load(work, LEPTON + "mounts: [{path: /, mount_path: /mnt, from: 'node-nfs:x'}]\n").data["mounts"]
    assert mounts == [{"source": "/", "target": "/mnt", "read_only": False, "volume": "node-nfs:x"}]


def test_a_template_is_looked_for_beside_the_file_that_names_it(work: Path) -> None:
    write(work / "profiles", a=SLURM + "template: mine.sbatch.j2\n")
    assert load(work, "extends: a\n").data["template"] == str(work / "profiles" / "mine.sbatch.j2")
    assert load(work, SLURM + "template: /etc/x\n").data["template"] == "/etc/x"


def test_sizes_and_config_make_the_layer_over_the_config(work: Path) -> None:
    text = SLURM + "nodes: 2\ngpus_per_node: 4\nconfig:\n  dpo: {max_num_steps: 3}\n  lr: ${.dpo.x}\n"
    profile = load(work, text)
    assert to_plain(profile.layer) == {
        "dpo": {"max_num_steps": 3},
        "lr": "${.dpo.x}",  # resolved in the config that it becomes a part of
        "cluster": {"num_nodes": 2, "gpus_per_node": 4},
    }
    node = find(profile.layer, ("cluster", "num_nodes"))
    assert node is not None
    assert str(node.source) == "profiles/p.yaml:3"
    both = "nodes=2 and config.cluster.num_nodes=3 (profiles/p.yaml:4) are one setting"
    assert both in message(work, SLURM + "nodes: 2\nconfig: {cluster: {num_nodes: 3}}\n")


def test_tunnel_says_how_sbatch_is_reached(work: Path) -> None:
    assert load(work, SLURM).data["tunnel"] == {"type": "local"}
    assert load(work, SLURM + "tunnel: local\n").data["tunnel"] == {"type": "local"}
    tunnel = load(work, SLURM + "tunnel: {host: h, port: 2222, proxy_jump: j}\n").data["tunnel"]
    assert {"type": "ssh", "host": "h", "port": 2222, "proxy_jump": "j", "user": None}.items() <= tunnel.items()
    write(work / "profiles", a=SLURM + "tunnel: {host: h}\n")
    assert load(work, "extends: a\ntunnel: local\n").data["tunnel"] == {"type": "local"}
    assert "tunnel.host is missing" in message(work, SLURM + "tunnel: ssh\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 5400), ("90:30", 5430), ("04:00:00", 14400), ("1-12", 129600), ("1-12:30", 131400), ("1-00:00:01", 86401)],
)
def test_slurms_forms_of_a_time_limit(text: str, expected: int) -> None:
    assert seconds(text) == expected  # forms as in sbatch(1), --time


@pytest.mark.parametrize("time", ["90", "'90'", "04:00:00", "1-12", "1-12:30:00"])
def test_a_time_limit_is_text(work: Path, time: str) -> None:
    assert load(work, SLURM + f"time: {time}\n").data["time"] == time.strip("'")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nodes: 2\n", "profiles/p.yaml:1: profile p: executor is missing"),
        ("executor: dgxcloud\n", "profiles/p.yaml:1: profile p: the executor dgxcloud is not supported"),
        ("executor: slurm\n", "profiles/p.yaml:1: profile p: remote_job_dir is missing"),
        (
            "executor: local\npartition: x\n",
            ":2: profile p: partition is a key of slurm; the executor local does not use it",
        ),
        ("executor: local\nnodes: 1\n", "does not use it\n       this machine is one node"),
        (LEPTON + "tunnel: ssh\n", "does not use it\n       Lepton is reached over HTTPS"),
        (SLURM + "node_group: x\n", ":3: profile p: node_group is a key of lepton; the executor slurm does not use it"),
        (SLURM + "partiton: x\n", ":3: profile p: unknown key partiton\n       did you mean partition?"),
        (SLURM + "tunnel: {hst: x}\n", "unknown key tunnel.hst\n       did you mean tunnel.host?"),
        (SLURM + "run: {}\n", "unknown key run\n       values of the step's config stand under config:"),
        (SLURM + "nodes: two\n", ":3: profile p: nodes must be a whole number or null, got the text 'two'"),
        (SLURM + "nodes: 0\n", "nodes must be at least 1, got 0"),
        (SLURM + "account: 7\n", "account must be text or null, got the number 7\n       quotes make it text: '7'"),
        (SLURM + "time: 4 hours\n", "time cannot be '4 hours'\n       for example 04:00:00"),
        (SLURM + 'time: "04:00:00\\n"\n', "time cannot be '04:00:00\\n'"),
        (SLURM + "mem: lots\n", "mem cannot be 'lots'\n       for example 500G"),
        (SLURM + "gpu_directive: gpus\n", "gpu_directive must be one of gpus-per-node, gres, none; got gpus"),
        (SLURM + "account: ${oc.env:NOWHERE}\n", ":3: profile p: account: the environment variable NOWHERE is not set"),
        (SLURM + "account: ${acount}\n", "${acount} names no key\n       did you mean account?"),
        (SLURM + "setup: ['echo ${PATH}']\n", "a variable of the shell is written $NAME or \\${NAME}"),
        (SLURM + "mounts: [/lustre]\n", "got '/lustre'\n       for one folder at the same place: /lustre:/lustre"),
        (SLURM + "mounts: ['a:/b']\n", "a mount's folders are absolute paths, got 'a'"),
        (SLURM + "mounts: ['/a:/b:x']\n", "mounts takes HOST:CONTAINER or HOST:CONTAINER:ro, got '/a:/b:x'"),
        (SLURM + "mounts: [{path: /a, mount_path: /b, from: x}]\n", "from: names a volume of Lepton"),
        (LEPTON + "mounts: ['/a:/b']\n", "on Lepton a mount says which volume it comes from"),
        ("executor: slurm\nremote_job_dir: ~/jobs\n", "remote_job_dir must be an absolute path, got ~/jobs"),
        (SLURM + "env: {A-B: 1}\n", "the key env.A-B is not allowed"),
        (SLURM + "env: {A: [1]}\n", "env.A must be text, a number, true or false or null, got a list [1]"),
        (SLURM + "sbatch_args: [licenses]\n", "sbatch_args.0 must match ^-, got 'licenses'"),
        ("extends: 3\n", ":1: extends takes the name of a profile, or a list of names"),
    ],
)
def test_what_is_wrong_is_one_message_with_its_line(work: Path, text: str, expected: str) -> None:
    assert expected in message(work, text)


def test_everything_that_is_wrong_comes_at_once(work: Path) -> None:
    text = SLURM + "partiton: x\nnodes: two\naccount: ${oc.env:NOWHERE}\nttl: 3\nenv: {API_KEY: abc}\n"
    said = message(work, text)
    assert said.startswith("error: profiles/p.yaml: profile p: 5 problems\n")
    places = [line.strip().split(": ")[0] for line in said.splitlines() if line.startswith("       profiles")]
    assert places == [f"profiles/p.yaml:{line}" for line in (3, 4, 5, 6, 7)]


def test_a_mistake_of_a_parent_is_told_where_it_was_made(work: Path) -> None:
    write(work / "profiles", a=SLURM + "account: ${oc.env:NOWHERE}\n")
    assert message(work, "extends: a\n").startswith(
        "error: profiles/a.yaml:3: profile p: account: the environment variable NOWHERE is not set"
    )


# Secrets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("HF_TOKEN", True),
        ("WANDB_API_KEY", True),
        ("AWS_SECRET_ACCESS_KEY", True),
        ("DB_PASSWORD", True),
        ("PGPASSWD", False),
        ("MY_PASSWD", True),
        ("GOOGLE_APPLICATION_CREDENTIALS", True),
        ("hf_token", True),
        ("TOKENIZERS_PARALLELISM", False),
        ("MAX_TOKENS", False),
        ("MONKEY", False),
        ("KEYRING", False),
    ],
)
def test_whole_words_of_a_name_tell_a_secret(name: str, secret: bool) -> None:
    assert is_secret_name(name) is secret


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("${oc.env:HF_TOKEN}", Secret("HF_TOKEN", source="HF_TOKEN")),
        ("${oc.env:MY_HUB}", Secret("HF_TOKEN", source="MY_HUB")),
        ("${oc.env:HF_TOKEN,''}", Secret("HF_TOKEN", source="HF_TOKEN", optional=True)),
        ("${ oc.env: HF_TOKEN , null }", Secret("HF_TOKEN", source="HF_TOKEN", optional=True)),
    ],
)
def test_a_variable_with_a_secrets_name_becomes_one(work: Path, written: str, expected: Secret) -> None:
    profile = load(work, SLURM + f'env: {{HF_TOKEN: "{written}", A: 1}}\n', HF_TOKEN="hf_abc", MY_HUB="hf_abc")
    assert (profile.secrets, profile.data["env"]) == ((expected,), {"A": "1"})
    assert "hf_abc" not in repr(vars(profile))


@pytest.mark.parametrize(
    "written", ["hf_abc", "${oc.env:A,hf_abc}", "x${oc.env:HF_TOKEN}hf_abc", "${oc.env:${A},''}hf_abc"]
)
def test_a_secrets_value_in_a_profile_is_refused_and_not_repeated(work: Path, written: str) -> None:
    said = message(work, SLURM + f'env: {{HF_TOKEN: "{written}"}}\n', A="hf_abc")
    assert "env.HF_TOKEN is a secret by its name: a profile does not hold its value" in said
    assert "secrets: [HF_TOKEN]" in said
    assert "hf_abc" not in said


def test_an_empty_secret_is_none(work: Path) -> None:
    profile = load(work, SLURM + "env: {HF_TOKEN: '', WANDB_API_KEY: null}\n")
    assert (profile.secrets, profile.data["env"]) == ((), {})


@pytest.mark.parametrize(
    "where",
    [
        "account: x${oc.env:HF_TOKEN}",
        "account: ${oc.env:HF_TOKEN,none}",
        "account: ${oc.env:${qos}}\nqos: HF_TOKEN",
        "setup: ['login ${oc.env:HF_TOKEN}']",
        "env: {A: '${oc.env:HF_TOKEN}'}",
        "config: {a: {b: 'x${oc.env:HF_TOKEN,y}'}}",
        "account: ${oc.decode:${oc.env:HF_TOKEN}}",
    ],
)
@pytest.mark.parametrize("env", [{}, {"HF_TOKEN": "hf_abc"}])
def test_a_secret_anywhere_else_is_refused_with_the_remedy(work: Path, where: str, env: dict[str, str]) -> None:
    said = message(work, SLURM + where + "\n", **env)
    assert "HF_TOKEN is a secret: its value is not written anywhere" in said
    assert "secrets: [HF_TOKEN]" in said
    assert "hf_abc" not in said


def test_a_declared_secret_is_guarded_whatever_its_name(work: Path) -> None:
    said = message(work, SLURM + "secrets: {LOGIN: {env: MY_LOGIN}}\naccount: ${oc.env:MY_LOGIN}\n", MY_LOGIN="abc")
    assert "MY_LOGIN is a secret" in said
    assert "abc" not in said


def test_a_name_can_be_declared_no_secret(work: Path) -> None:
    profile = load(work, SLURM + "secrets: {SORT_KEY: false}\nenv: {SORT_KEY: id, A: '${oc.env:SORT_KEY,x}'}\n")
    assert (profile.secrets, profile.data["env"]) == ((), {"SORT_KEY": "id", "A": "x"})
    assert profile.public == {"SORT_KEY"}


def test_lepton_secrets_name_the_workspaces(work: Path) -> None:
    text = LEPTON + "secrets: {HF_TOKEN: {reference: hub}, WANDB_API_KEY: {optional: true}}\n"
    profile = load(work, text)
    assert profile.secrets == (Secret("HF_TOKEN", source="HF_TOKEN", reference="hub"),)
    assert "WANDB_API_KEY" in profile.warnings[0]


# Cost ----------------------------------------------------------------------------------------------------------------


def test_loading_one_imports_nothing_heavy() -> None:
    code = (
        "import sys; from nemotron_launch.profiles import load_profile; load_profile('slurm_rl_nemo_rl_dpo', env={});"
        "print(*{'omegaconf', 'jsonschema', 'rich', 'jinja2', 'difflib', 'tomllib'} & set(sys.modules))"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd="/", check=True)
    assert done.stdout.strip() == ""
