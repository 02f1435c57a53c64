"""Text to token ids and back: Hugging Face tokenizers, the byte-level one of the tiny configs, chat templates.

transformers is imported when a tokenizer is loaded, not when this module is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.paths import hub_is_offline, is_hub_id, resolve_path

Message = Mapping[str, Any]

#: NeMo-RL's passthrough template: the messages' text, one after the other.
PASSTHROUGH = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

#: The byte-level tokenizer: ids 0-255 are the bytes themselves, then these three. `<bos>` only keeps its id: it is
#: never added, so that raw text starts with its own first byte.
BYTE_SPECIALS = ("<pad>", "<bos>", "<eos>")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A loaded tokenizer with its chat template; made by `load_tokenizer` or `Tokenizer.from_folder`.

    vocab_size counts every id, added tokens included. bos_id is None where sequences start without one. stop_ids end
    a generated answer: EOS first, then those of the generation config and the template's end-of-turn token.
    """

    name: str
    hf: Any = field(repr=False)
    vocab_size: int
    eos_id: int
    bos_id: int | None
    pad_id: int
    stop_ids: tuple[int, ...]
    chat_template: str | None = field(repr=False)
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, folder: Path, *, chat_template_kwargs: Mapping[str, Any] | None = None) -> Tokenizer:
        """The tokenizer that `save` wrote into `folder`, or any Hugging Face folder's, with its own chat template."""
        section = {"name": str(folder), "chat_template_kwargs": chat_template_kwargs}
        return load_tokenizer(section, None, key=str(folder))

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens that the text spells out are theirs, none are added."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids (int32) of each text, as `encode`, on all cores where the tokenizer is a fast one."""
        if self.hf.is_fast:
            encodings = self.hf.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        return [np.array(self.hf.encode(text, add_special_tokens=False), dtype=np.int32) for text in texts]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Text of ids, special tokens spelled out unless skipped."""
        plain = [int(i) for i in ids]
        text: str = self.hf.decode(plain, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        return text

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Text of each row of ids, as `decode`, on all cores where the tokenizer is a fast one."""
        if self.hf.is_fast:
            texts: list[str] = self.hf.backend_tokenizer.decode_batch(rows, skip_special_tokens=False)
            return texts
        return [self.decode(row) for row in rows]

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Any = None) -> str:
        """The chat template's text of a conversation. Raises jinja2.TemplateError where the template refuses it."""
        text: str = self.hf.apply_chat_template(
            list(messages),
            tools=tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **self.chat_template_kwargs,
        )
        return text

    def chat_ids(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Any = None) -> list[int]:
        """Ids of the chat template's text, BOS first if the tokenizer has one and the template does not write it."""
        ids = self.encode(self.render(messages, add_generation_prompt=add_generation_prompt, tools=tools))
        return ids if self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def save(self, folder: Path) -> None:
        """Write the tokenizer, its template and its stop ids into `folder`, as AutoTokenizer and engines want them."""
        folder.mkdir(parents=True, exist_ok=True)
        self.hf.save_pretrained(folder)
        config = folder / "tokenizer_config.json"
        text = config.read_text(encoding="utf-8")
        # transformers 5's name of PreTrainedTokenizerFast; it knows both, transformers 4, as in many engines, one.
        config.write_text(text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), encoding="utf-8")
        stops = {"bos_token_id": self.bos_id, "eos_token_id": list(self.stop_ids), "pad_token_id": self.pad_id}
        (folder / "generation_config.json").write_text(json.dumps(stops, indent=2) + "\n", encoding="utf-8")

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over all that decides ids: the tokenizer's model and rules, special ids, chat template.

        Neither paths nor library versions enter, so it is the same on every machine and after `save`.
        """
        if self.hf.is_fast:
            rules = json.loads(self.hf.backend_tokenizer.to_str())
            for key in ("version", "truncation", "padding", "post_processor"):  # none of them acts on `encode`
                rules.pop(key, None)
        else:
            rules = {"class": type(self.hf).__name__, "vocab": self.hf.get_vocab()}
        what = [rules, self.eos_id, self.bos_id, self.pad_id, self.chat_template]
        return hashlib.sha256(json.dumps(what, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def load_tokenizer(
    section: Mapping[str, Any],
    model_name: str | None,
    *,
    step_dir: Path | None = None,
    key: str = "policy.tokenizer",
) -> Tokenizer:
    """The tokenizer that a config's `policy.tokenizer` section names.

    section: `name` (null: `model_name`; "bytes": the byte-level one; a folder; a hub id), `chat_template` ("default" or
    absent: the tokenizer's own if it has one, else none; null: PASSTHROUGH; a jinja text; the path of a .jinja file),
    `chat_template_kwargs` (passed on to the template). All as in NeMo-RL.
    step_dir: what `step://` stands for. Raises UserError where the tokenizer or template is missing or unusable.
    """
    name = section.get("name") or model_name
    if not name:
        raise UserError(
            "no tokenizer is named",
            where=f"{key}.name",
            hint='set policy.model_name, or name one ("bytes": one id a byte)',
        )
    hf, generation_eos = _byte_level() if name == "bytes" else _hugging_face(str(name), step_dir, f"{key}.name")
    if hf.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no end-of-sequence token", where=f"{key}.name")
    if hf.pad_token_id is None:
        hf.pad_token = hf.eos_token
    hf.chat_template = _chat_template(section.get("chat_template", "default"), hf, step_dir, f"{key}.chat_template")
    kwargs = dict(section.get("chat_template_kwargs") or {})
    stops = dict.fromkeys([hf.eos_token_id, *generation_eos, *_end_of_turn(hf, kwargs)])
    return Tokenizer(
        name=str(name),
        hf=hf,
        vocab_size=max(len(hf), 1 + max(hf.get_vocab().values())),
        eos_id=hf.eos_token_id,
        bos_id=hf.bos_token_id,
        pad_id=hf.pad_token_id,
        stop_ids=tuple(stops),
        chat_template=hf.chat_template,
        chat_template_kwargs=kwargs,
    )


def _byte_level() -> tuple[Any, list[int]]:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    # ByteLevel spells each byte as one printable character (GPT-2's table): the printable bytes as themselves, the
    # others as the code points from 256 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    vocab = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in BYTE_SPECIALS])
    pad, _, eos = BYTE_SPECIALS
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, eos_token=eos), []


def _hugging_face(name: str, step_dir: Path | None, where: str) -> tuple[Any, list[int]]:
    """A folder's or hub id's tokenizer, and the end-of-sequence ids that its generation config lists."""
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    folder = resolve_path(name, step_dir, where)
    if folder.is_dir():
        source, offline = str(folder), True
    elif folder.exists() or not is_hub_id(name):
        raise UserError(f"{folder} is no folder with a tokenizer", where=where)
    else:
        source, offline = name, hub_is_offline()
    try:
        hf = AutoTokenizer.from_pretrained(source, local_files_only=offline)
        found = cached_file(
            source, "generation_config.json", local_files_only=offline, _raise_exceptions_for_missing_entries=False
        )
    except Exception as error:  # the hub's client raises its own kinds, the HTTP library's and OSError
        raise _no_tokenizer(name, folder, offline, where, error) from error
    eos = json.loads(Path(found).read_text(encoding="utf-8")).get("eos_token_id") if found else None
    return hf, eos if isinstance(eos, list) else [eos] if isinstance(eos, int) else []


def _no_tokenizer(name: str, folder: Path, offline: bool, where: str, error: Exception) -> UserError:
    if folder.is_dir():
        first = str(error).strip().splitlines()
        return UserError(
            f"{folder} holds no usable tokenizer", where=where, hint=first[0] if first else type(error).__name__
        )
    if offline:
        return UserError(
            f"{name} is no folder here, is not in the local Hugging Face cache, and the hub cannot be reached",
            where=where,
            hint="give the path of a folder, or run once where there is a network",
        )
    first = str(error).strip().splitlines()
    return UserError(
        f"the Hugging Face hub gives no tokenizer for {name}",
        where=where,
        hint="\n".join([*(first[:1]), "a private model needs HF_TOKEN; a local one, the path of its folder"]),
    )


def _chat_template(wanted: str | None, hf: Any, step_dir: Path | None, where: str) -> str | None:
    if wanted is None:
        return PASSTHROUGH
    if wanted.lower() == "default":
        own: str | None = hf.chat_template.get("default") if isinstance(hf.chat_template, dict) else hf.chat_template
        return own
    if not wanted.endswith(".jinja"):
        return wanted
    path = resolve_path(wanted, step_dir, where)
    if not path.is_file():
        raise UserError(f"no such file: {path}", where=where)
    return path.read_text(encoding="utf-8")


def _end_of_turn(hf: Any, kwargs: Mapping[str, Any]) -> list[int]:
    """The special token with which the template ends an assistant's turn, if it does."""
    if hf.chat_template is None:
        return []
    from jinja2 import TemplateError

    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text = hf.apply_chat_template(turn, tokenize=False, add_generation_prompt=False, **kwargs)
    except (TemplateError, TypeError, KeyError, ValueError):
        return []  # a template that wants other messages: the rows will tell what it makes of theirs
    last = hf.encode(text.rstrip("\n"), add_special_tokens=False)[-1:]
    special = {*hf.all_special_ids, *(i for i, token in hf.added_tokens_decoder.items() if token.special)}
    return [i for i in last if i in special]
