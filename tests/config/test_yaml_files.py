"""YAML: lines, numbers, and one message for what can be wrong in a file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nemotron_launch import cache
from nemotron_launch.config import yaml_reader
from nemotron_launch.config.tree import Node, leaves, to_plain
from nemotron_launch.config.yaml_files import dump, load_plain, load_tree, parse_tree
from nemotron_launch.errors import UserError


def test_every_key_knows_its_line() -> None:
    root = parse_tree("# comment\na:\n  b: 1\n  c:\n  - x\n  - y\nd: |\n  text\n", "f.yaml")
    lines = {".".join(path): node.source.line for path, node in leaves(root)}
    assert lines == {"a.b": 3, "a.c.0": 5, "a.c.1": 6, "d": 7}


@pytest.mark.parametrize(
    "text",
    ["1e-6", "1E5", "1.5e3", "-2e+4", ".5", "5.", "1_000", "0x1F", "2024-01-02", "on", "no", "~", "1e", "0o7"]
    + [".inf", "-.inf", "'1'", "+3", "-0", "0.1.2", "1,5", "e5", "0b11", "010", "1__0", "null", "True"],
)
def test_scalars_are_read_as_omegaconf_reads_them(text: str) -> None:
    assert to_plain(parse_tree(f"a: {text}", "f")) == OmegaConf.to_container(OmegaConf.create(f"a: {text}"))


@pytest.mark.parametrize("text", ["12:30", "04:00:00", "1:30.5"])
def test_a_time_is_text_and_no_number_in_base_60(text: str) -> None:
    assert to_plain(parse_tree(f"a: {text}", "f")) == {"a": text}


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3", "a is set twice, first on line 1"),
        ("a:\n  x: 1\n  x: 2\n", "f.yaml:3", "x is set twice, first on line 2"),
        ("- 1\n", "f.yaml:1", "a mapping (key: value) expected, found a list"),
        ("text\n", "f.yaml:1", "a mapping (key: value) expected, found 'text'"),
        ("a:\n\tb: 1\n", "f.yaml:2", "a tab in the indentation"),
        ("a: [1,\nb: 2\n", "f.yaml:3", "not YAML: did not find expected ',' or ']'"),
        ("a: b: c\n", "f.yaml:1", "not YAML: mapping values are not allowed in this context"),
        ("a: 'x\n", "f.yaml:2", "not YAML: found unexpected end of stream"),
        ("a: *x\n", "f.yaml:1", "not YAML: found undefined alias"),
        ("a: &x {b: *x}\n", "f.yaml:1", "an alias that contains itself"),
        ("a: !!python/object:os.system 1\n", "f.yaml:1", "not YAML: could not determine a constructor"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2", "not YAML: but found another document"),
        ("[1]: 2\n", "f.yaml:1", "a key must be text"),
        ("a: {_override_: 3}\n", "f.yaml:1", "_override_ takes true or false"),
        ("a: !!int x\n", "f.yaml:1", "not a value"),
        ("a: \x00\n", "f.yaml", "not YAML"),
    ],
)
def test_a_broken_file_is_one_message_with_its_line(text: str, where: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_tree(text, "f.yaml")
    assert caught.value.where == where
    assert caught.value.message.startswith(message)


def test_an_alias_bomb_is_refused() -> None:
    levels = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    levels += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(UserError, match="more than"):
        parse_tree("\n".join(levels), "f.yaml")


@pytest.mark.parametrize("text", ["a: " + "[" * 100_000, "a: " + "{b: " * 5000, "- " * 100_000])
def test_endless_nesting_is_one_message_and_no_crash(text: str) -> None:
    with pytest.raises(UserError, match="nested too deeply"):
        parse_tree(text, "f.yaml")


def test_merge_keys_of_yaml_work() -> None:
    root = parse_tree("base: &b {x: 1, y: 2}\nown:\n  <<: *b\n  y: 3\n", "f")
    assert to_plain(root)["own"] == {"x": 1, "y": 3}


def test_an_empty_file_is_an_empty_config(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("# nothing\n")
    assert to_plain(load_tree(tmp_path / "f.yaml")) == {}


@pytest.mark.parametrize(("content", "message"), [(b"\xff\xfe", "not UTF-8"), (None, "no such config file")])
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "f.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tree(path)
    assert caught.value.where == str(path)


_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12)
    | st.sampled_from(
        ["1e-6", "12:30", "on", "null", "010", "2020-01-01", "", " x", "a: b", "x\ny\n", "~", "0x1", "=", "1_0"]
    )
)
_data = st.dictionaries(
    st.text("abc_1", min_size=1, max_size=5),
    st.recursive(
        _scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("xy", min_size=1), inner)
    ),
    max_size=5,
)


@settings(deadline=None)
@given(_data)
def test_what_is_dumped_means_the_same_to_every_reader(data: dict[str, object]) -> None:
    text = dump(data)
    ours = to_plain(parse_tree(text, "f"))
    assert _exact(ours) == _exact(data)
    assert _exact(yaml.safe_load(text)) == _exact(data)


def _exact(value: object) -> object:
    """Tells 1 from 1.0 and True, which compare equal."""
    if isinstance(value, dict):
        return {key: _exact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_exact(item) for item in value]
    return (type(value).__name__, "nan" if isinstance(value, float) and math.isnan(value) else value)


_words = st.text("abcN_./:@+- 019\\", max_size=8) | st.sampled_from(
    ["no", "No", "/a b", "./a", ".5", "a:b", "a: b", "a:", "1e-6", "-", "- a", "a #b", "x:/y", "~/a", "a  b", "a b "]
)
_plainer = st.dictionaries(
    _words,
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | _words,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_words, inner, max_size=3),
    ),
    max_size=4,
)


@settings(deadline=None)
@given(_plainer)
def test_plain_words_are_written_as_pyyaml_writes_them(data: dict[str, object]) -> None:
    assert dump(data) == yaml_reader.dump(data)


@settings(deadline=None)
@given(_data)
def test_any_data_is_written_as_pyyaml_writes_it(data: dict[str, object]) -> None:
    assert dump(data) == yaml_reader.dump(data)


def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files count as settled at once: a file's change time cannot be set back."""
    monkeypatch.setattr(cache, "SETTLED", -1.0)


def test_a_file_is_parsed_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(monkeypatch)
    path = tmp_path / "f.yaml"
    text = "a: {_override_: true, b: [1, 2.5, x, null, true, .inf]}\nc:\n  d: 'e'\n"
    path.write_text(text)
    first = load_tree(path)
    with monkeypatch.context() as patch:
        patch.setattr(yaml_reader, "parse_tree", None)
        again = load_tree(path)
    assert rows(again) == rows(first) == rows(parse_tree(text, str(path)))
    path.write_text(text.replace("'e'", "'f'"))
    assert to_plain(load_tree(path))["c"] == {"d": "f"}


def rows(root: Node) -> list[tuple[object, ...]]:
    return [(path, node.value, node.source) for path, node in leaves(root)] + [("replaces", root.value["a"].replaces)]


def test_a_fresh_file_is_not_kept_for_its_next_change_may_bear_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    for n in range(20):
        path.write_text(f"a: {n % 10}\n")
        assert to_plain(load_tree(path)) == {"a": n % 10}


@pytest.mark.parametrize("text", ["1: a\n", "a: {2: b}\n", "a: !!binary aGk=\n", "a: [1, {x: 1.0}]\n"])
def test_plain_data_comes_back_from_the_cache_as_it_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    kept(monkeypatch)
    path = tmp_path / "f.yaml"
    path.write_text(text)
    assert load_plain(path) == load_plain(path) == yaml.safe_load(text)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[1, 2]", b"\xff"])
def test_a_broken_cache_is_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    kept(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "f.yaml"
    path.write_text("a: 1\n")
    load_tree(path)
    (found,) = (tmp_path / "cache/nemotron/files").iterdir()
    found.write_bytes(content)
    assert to_plain(load_tree(path)) == {"a": 1}


def test_a_cache_that_others_may_write_to_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cache/nemotron/files"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    path = tmp_path / "f.yaml"
    path.write_text("a: 1\n")
    load_tree(path)
    assert list(folder.iterdir()) == []
