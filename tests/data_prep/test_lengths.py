"""Lengths in tokens: as the trainer's tokenizer counts them, and summed up without losing a row."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_launch.data_prep.lengths import Lengths, load_counter
from nemotron_launch.errors import UserError
from nemotron_launch.trainer.tokenizer import load_tokenizer

TEXTS = ["", "What is 2 + 2?", "Ünïcode 数学 \U0001f600", "<eos>between<pad><bos>", "a\n\n  b", "x" * 500]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n<|{{ m.role }}|>{{ m['content'] | trim }}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MESSAGES = [{"role": "system", "content": " Sum <up>. "}, {"role": "user", "content": "1 + 1 é"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `save_pretrained` writes it: BPE of a few merges, special tokens, a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rules = Tokenizer(models.BPE())
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    rules.train_from_iterator(["what is the sum of what is what"] * 5, trainer)
    hf = PreTrainedTokenizerFast(tokenizer_object=rules, bos_token="<s>", eos_token="</s>")
    hf.chat_template = TEMPLATE
    path = tmp_path_factory.mktemp("tokenizer")
    hf.save_pretrained(path)
    return path


@pytest.mark.parametrize("named", ["bytes", "folder"])
def test_counts_are_those_of_the_trainers_tokenizer(named: str, folder: Path) -> None:
    section = {"name": "bytes" if named == "bytes" else str(folder)}
    counter = pickle.loads(pickle.dumps(load_counter(section)))  # as a worker gets it
    trainers = load_tokenizer(section, None)
    texts = [*TEXTS, "what is</s>the sum"]
    assert counter.counts(texts).tolist() == [len(ids) for ids in trainers.encode_batch(texts)]
    assert counter.counts([]).tolist() == []


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "é<b>"}}]])
@pytest.mark.parametrize("template", ["default", None, "{% for m in messages %}[{{ m.content }}]{% endfor %}", "file"])
def test_conversations_are_rendered_as_the_trainer_does(
    folder: Path, tmp_path: Path, template: str | None, tools: list[dict[str, object]] | None
) -> None:
    if template == "file":
        template = str(tmp_path / "own.jinja")
        Path(template).write_text("{% for m in messages %}\n  {% if m.role %}\n{{ m.role }}\n  {% endif %}{% endfor %}")
    section = {"name": str(folder), "chat_template": template}
    counter = pickle.loads(pickle.dumps(load_counter(section)))
    trainers = load_tokenizer(section, None)
    for prompt in (True, False):
        expected = trainers.render(MESSAGES, add_generation_prompt=prompt, tools=tools)
        assert counter.conversation(MESSAGES, tools=tools, add_generation_prompt=prompt) == expected


def test_without_a_template_a_conversation_is_its_texts() -> None:
    assert load_counter({"name": "bytes"}).conversation(MESSAGES) == " Sum <up>. 1 + 1 é"


def test_what_a_template_refuses_is_said(folder: Path) -> None:
    counter = load_counter({"name": str(folder), "chat_template": "{{ raise_exception('roles must alternate') }}"})
    with pytest.raises(ValueError, match="the chat template refuses the messages .roles must alternate"):
        counter.conversation(MESSAGES)


def test_a_tokenizer_that_is_not_there_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_counter({"name": str(tmp_path / "none")})
    assert caught.value.where == "tokenizer.name"
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        load_counter({"name": str(tmp_path)})
    assert "tokenizer.json cannot be read" in caught.value.message


def test_a_worker_counts_without_torch_and_transformers(folder: Path) -> None:
    code = (
        "import sys; from nemotron_launch.data_prep.lengths import load_counter\n"
        "for name in ('bytes', sys.argv[1]): load_counter({'name': name}).counts(['what is'])\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 3000), max_size=40), max_size=4), st.integers(0, 3000))
def test_summary_of_merged_lengths_is_that_of_all_rows(workers: list[list[int]], limit: int) -> None:
    total = Lengths()
    for counts in workers:
        one = Lengths()
        one.add(np.array(counts, np.int32))
        total.merge(one)
    rows = np.sort(np.array([count for counts in workers for count in counts], np.int64))
    summary = total.summary(limit)
    assert json.loads(json.dumps(summary)) == summary
    assert (summary["rows"], summary["tokens"]) == (len(rows), rows.sum())
    if not len(rows):
        return
    assert (summary["min"], summary["max"]) == (rows[0], rows[-1])
    assert summary["over_max_length"] == (rows > limit).sum()
    for name, share in (("p50", 50), ("p90", 90), ("p99", 99), ("p99.9", 99.9)):
        assert summary[name] == np.percentile(rows, share, method="inverted_cdf")
    assert sum(bin["rows"] for bin in summary["histogram"]) == len(rows)
    for bin in summary["histogram"]:
        assert bin["rows"] == ((rows >= bin["from"]) & (rows <= bin["to"])).sum()
