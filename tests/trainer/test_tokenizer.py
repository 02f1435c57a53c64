"""The trainer's tokenizers: ids, templates, stop ids, saving, fingerprints, and what a missing one says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_launch.errors import UserError
from nemotron_launch.trainer import paths
from nemotron_launch.trainer.tokenizer import PASSTHROUGH, Tokenizer, load_tokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
ASK = [{"role": "user", "content": "what is two and two?"}]
ANSWER = {"role": "assistant", "content": "it is four."}


def test_bytes_are_their_own_ids(byte_tokenizer: Tokenizer) -> None:
    assert byte_tokenizer.encode("sort 31é") == list("sort 31é".encode())
    assert byte_tokenizer.vocab_size == 259  # 256 bytes, <pad>, <bos>, <eos>
    assert (byte_tokenizer.pad_id, byte_tokenizer.bos_id, byte_tokenizer.eos_id) == (256, None, 258)
    assert byte_tokenizer.stop_ids == (258,)
    assert not byte_tokenizer.has_chat_template


@given(text=TEXT)
def test_every_text_survives_bytes(byte_tokenizer: Tokenizer, text: str) -> None:
    assert byte_tokenizer.decode(byte_tokenizer.encode(text)) == text


@given(text=TEXT)
def test_every_text_survives_merges(chat_tokenizer: Tokenizer, text: str) -> None:
    assert chat_tokenizer.decode(chat_tokenizer.encode(text)) == text


@given(texts=st.lists(TEXT, max_size=4))
def test_batches_encode_as_single_texts_do(chat_tokenizer: Tokenizer, texts: list[str]) -> None:
    assert [ids.tolist() for ids in chat_tokenizer.encode_batch(texts)] == [chat_tokenizer.encode(t) for t in texts]


@pytest.mark.parametrize("which", ["byte_tokenizer", "chat_tokenizer", "raw_tokenizer"])
def test_batches_decode_as_single_texts_do(which: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(which)
    rows = [[], *([i, i] for i in range(tokenizer.vocab_size)), list(range(tokenizer.vocab_size))]
    assert tokenizer.decode_batch(rows) == [tokenizer.decode(row) for row in rows]


def test_special_tokens_can_be_left_out_of_text(byte_tokenizer: Tokenizer) -> None:
    assert byte_tokenizer.decode([52, 258], skip_special_tokens=True) == "4"
    assert byte_tokenizer.decode([52, 258]) == "4<eos>"


@pytest.mark.parametrize("which", ["byte_tokenizer", "chat_tokenizer", "raw_tokenizer"])
def test_saved_tokenizer_is_the_same_tokenizer(which: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    before: Tokenizer = request.getfixturevalue(which)
    before.save(tmp_path / "a")
    after = Tokenizer.from_folder(tmp_path / "a")
    text = "the cat <|im_end|> é\n"
    assert after.encode(text) == before.encode(text)
    for name in ("vocab_size", "eos_id", "bos_id", "pad_id", "stop_ids", "chat_template", "fingerprint"):
        assert getattr(after, name) == getattr(before, name), name


def test_saved_byte_tokenizer_loads_with_auto_tokenizer(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    byte_tokenizer.save(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("sort 1", add_special_tokens=False)["input_ids"] == list(b"sort 1")
    assert (len(loaded), loaded.eos_token, loaded.pad_token, loaded.bos_token) == (259, "<eos>", "<pad>", None)


def test_fingerprint_of_bytes_is_the_same_everywhere(byte_tokenizer: Tokenizer) -> None:
    # Recorded with tokenizers 0.23; a change means that checkpoints' tokenizers would no longer be recognised.
    assert byte_tokenizer.fingerprint.startswith("e1f1c8999a8ce049")


def test_fingerprint_tells_templates_apart(chat_folder: Path, chat_tokenizer: Tokenizer) -> None:
    other = load_tokenizer({"name": str(chat_folder), "chat_template": PASSTHROUGH}, None)
    assert other.fingerprint != chat_tokenizer.fingerprint


def test_model_name_is_the_tokenizer_unless_one_is_named(chat_folder: Path) -> None:
    assert load_tokenizer({}, str(chat_folder)).bos_id is not None
    assert load_tokenizer({"name": None}, str(chat_folder)).bos_id is not None
    assert load_tokenizer({"name": "bytes"}, str(chat_folder)).vocab_size == 259


def test_chat_ids_begin_with_bos_once(chat_folder: Path, chat_tokenizer: Tokenizer) -> None:
    ids = chat_tokenizer.chat_ids(ASK, add_generation_prompt=True)
    assert chat_tokenizer.decode(ids) == (
        "<s><|im_start|>user\nwhat is two and two?<|im_end|>\n<|im_start|>assistant\n"
    )
    writes_bos = load_tokenizer({"name": str(chat_folder), "chat_template": "{{ bos_token }}" + PASSTHROUGH}, None)
    assert writes_bos.chat_ids(ASK, add_generation_prompt=True).count(0) == 1  # <s> is id 0


def test_end_of_turn_and_generation_config_stop_an_answer(chat_folder: Path, tmp_path: Path) -> None:
    for file in chat_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    # ids in the order of the fixture's special tokens: </s> 1, <pad> 2, <|im_end|> 4
    assert load_tokenizer({"name": str(tmp_path)}, None).stop_ids == (1, 2, 4)
    assert load_tokenizer({"name": str(chat_folder)}, None).stop_ids == (1, 4)
    assert load_tokenizer({"name": str(chat_folder), "chat_template": None}, None).stop_ids == (1,)


def test_chat_template_means_what_it_means_in_nemo_rl(
    chat_folder: Path, raw_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def text(template: object) -> str:
        section = {"name": str(chat_folder), "chat_template": template}
        loaded = load_tokenizer(section, None, step_dir=tmp_path)
        return loaded.render([*ASK, ANSWER], add_generation_prompt=False)

    (tmp_path / "mine.jinja").write_text("{{ messages[0]['content'] }}!")
    assert text("default").startswith("<|im_start|>user")
    assert text(None) == "what is two and two?it is four."
    assert text("{{ messages|length }}") == "2"
    assert text(str(tmp_path / "mine.jinja")) == text("step://mine.jinja") == "what is two and two?!"
    assert not raw_tokenizer.has_chat_template  # "default" of a tokenizer without one: raw text


def test_template_arguments_reach_the_template(chat_folder: Path) -> None:
    section = {
        "name": str(chat_folder),
        "chat_template": "{{ 'thinks' if think else 'blurts' }}",
        "chat_template_kwargs": {"think": True},
    }
    assert load_tokenizer(section, None).render(ASK, add_generation_prompt=True) == "thinks"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "policy.tokenizer.name: no tokenizer is named"),
        ({"name": "./nowhere"}, "policy.tokenizer.name: nowhere is no folder with a tokenizer"),
        ({"name": "step://tok"}, "policy.tokenizer.name: step://tok has no meaning outside a step"),
        ({"name": "bytes", "chat_template": "no.jinja"}, "policy.tokenizer.chat_template: no such file: no.jinja"),
    ],
)
def test_missing_tokenizer_is_one_clear_error(section: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_tokenizer(section, None)
    assert f"error: {message}" in str(caught.value)
    assert caught.value.exit_code == 2


def test_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="holds no usable tokenizer"):
        load_tokenizer({"name": str(tmp_path)}, None)


def test_hub_miss_without_a_network_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    paths.hub_is_offline.cache_clear()
    with pytest.raises(UserError, match="not in the local Hugging Face cache, and the hub cannot be reached"):
        load_tokenizer({"name": "nobody/no-such-model"}, None)
    paths.hub_is_offline.cache_clear()


def test_modules_load_without_heavy_libraries() -> None:
    code = (
        "import sys, nemotron_launch.trainer.data.preference, nemotron_launch.trainer.data.sft;"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
