"""How long rows are in the policy's tokens: counted in batches, summed up as a histogram and percentiles.

The tokenizer's own rules (tokenizer.json) and chat template are used without transformers, whose import takes more
memory than a worker; a tokenizer that has no such rules goes through it all the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.paths import hub_is_offline, is_hub_id, resolve_path
from nemotron_launch.trainer.tokenizer import BYTE_SPECIALS, PASSTHROUGH, load_tokenizer

PERCENTILES = (50, 90, 95, 99, 99.9)


@dataclass(frozen=True)
class TokenCounter:
    """Counts tokens as the trainer's tokenizer does; made by `load_counter`. Can be pickled to workers.

    rules: a `tokenizers.Tokenizer`, the trainer's Tokenizer where there are no rules, None for bytes.
    template: the chat template, None where there is none.
    """

    name: str
    rules: Any = field(repr=False)
    template: str | None = field(repr=False)
    specials: Mapping[str, str] = field(default_factory=dict, repr=False)
    template_kwargs: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def counts(self, texts: Sequence[str]) -> np.ndarray:
        """Tokens (int32, N) of each text; special tokens that the text spells out count as one, none are added."""
        if self.rules is None:
            return np.fromiter(map(_bytes, texts), np.int32, len(texts))
        encode = getattr(self.rules, "encode_batch_fast", None)
        ids = encode(list(texts), add_special_tokens=False) if encode else self.rules.encode_batch(texts)
        return np.fromiter(map(len, ids), np.int32, len(texts))

    def conversation(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Any = None, add_generation_prompt: bool = False
    ) -> str:
        """The chat template's text of a conversation; without a template, the messages' texts one after the other.

        Raises ValueError where the template refuses the messages.
        """
        if self._compiled is None:
            return "".join(str(message.get("content") or "") for message in messages)
        from jinja2 import TemplateError

        try:
            text: str = self._compiled.render(
                messages=messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **self.specials,
                **self.template_kwargs,
            )
        except (TemplateError, TypeError, KeyError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"the chat template refuses the messages ({first[:100]})") from error
        return text

    @cached_property
    def _compiled(self) -> Any:
        return None if self.template is None else _compile(self.template)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_compiled"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def load_counter(section: Mapping[str, Any], *, step_dir: Path | None = None, key: str = "tokenizer") -> TokenCounter:
    """The counter of a config's `tokenizer` section, whose keys are those of `policy.tokenizer`: name ("bytes", a
    folder or a hub id), chat_template, chat_template_kwargs. Raises UserError where the tokenizer is missing or
    unusable."""
    name = section.get("name")
    if name == "bytes":
        wanted = section.get("chat_template", "default")
        plain = None if wanted == "default" else _template(wanted, {}, step_dir, key)
        return TokenCounter("bytes", None, plain, {}, section.get("chat_template_kwargs") or {})
    files = _files(str(name), step_dir, key) if name else None
    if files is None:
        whole = load_tokenizer(section, None, step_dir=step_dir, key=key)
        return TokenCounter(str(name), whole, whole.chat_template, _specials(whole.hf.special_tokens_map))
    from tokenizers import Tokenizer as Rules

    try:
        rules = Rules.from_file(str(files["tokenizer.json"]))
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{files['tokenizer.json']} cannot be read ({error})", where=f"{key}.name") from error
    rules.no_padding()
    rules.no_truncation()
    config = json.loads(files["tokenizer_config.json"].read_text("utf-8")) if "tokenizer_config.json" in files else {}
    if "chat_template.jinja" in files:
        config["chat_template"] = files["chat_template.jinja"].read_text("utf-8")
    template = _template(section.get("chat_template", "default"), config, step_dir, key)
    return TokenCounter(str(name), rules, template, _specials(config), section.get("chat_template_kwargs") or {})


class Lengths:
    """A distribution of lengths in tokens, exact to the token; those of several workers are added up with `merge`."""

    def __init__(self) -> None:
        self._rows = np.zeros(1, np.int64)

    def add(self, counts: np.ndarray) -> None:
        """Take in rows of these lengths (integers, N)."""
        if len(counts):
            self._add(np.bincount(counts))

    def merge(self, other: Lengths) -> None:
        """Take in all rows of another distribution."""
        self._add(other._rows)

    def _add(self, rows: np.ndarray) -> None:
        if len(rows) > len(self._rows):
            self._rows = np.pad(self._rows, (0, len(rows) - len(self._rows)))
        self._rows[: len(rows)] += rows

    def summary(self, max_length: int | None = None) -> dict[str, Any]:
        """For a manifest: rows, tokens, mean, min, max, percentiles (nearest rank), histogram in powers of two
        ([{from, to, rows}], both ends included), and `over_max_length`, the rows longer than `max_length`, if given."""
        total = int(self._rows.sum())
        if not total:
            return {"rows": 0, "tokens": 0}
        lengths = np.flatnonzero(self._rows)
        tokens = int((np.arange(len(self._rows)) * self._rows).sum())
        ranks = np.cumsum(self._rows)
        percentiles = {f"p{p:g}": int(np.searchsorted(ranks, np.ceil(p / 100 * total))) for p in PERCENTILES}
        histogram = []
        below = 1
        begin = 0
        while begin <= lengths[-1]:
            if rows := int(self._rows[begin:below].sum()):
                histogram.append({"from": begin, "to": below - 1, "rows": rows})
            begin, below = below, 2 * below
        over = {} if max_length is None else {"over_max_length": int(self._rows[max_length + 1 :].sum())}
        return {
            "rows": total,
            "tokens": tokens,
            "mean": round(tokens / total, 2),
            "min": int(lengths[0]),
            "max": int(lengths[-1]),
            **percentiles,
            "histogram": histogram,
            **over,
        }


def _bytes(text: str) -> int:
    size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    if "<" in text:
        size -= sum(text.count(special) * (len(special) - 1) for special in BYTE_SPECIALS)
    return size


def _files(name: str, step_dir: Path | None, key: str) -> dict[str, Path] | None:
    """The tokenizer's files that there are; None where its rules are not among them."""
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    folder = resolve_path(name, step_dir, f"{key}.name")
    if folder.is_dir():
        found = {file: folder / file for file in names if (folder / file).is_file()}
    elif is_hub_id(name):
        from huggingface_hub import hf_hub_download

        found = {}
        for file in names:
            try:
                found[file] = Path(hf_hub_download(name, file, local_files_only=hub_is_offline()))
            except Exception:  # the hub's client raises many kinds; load_tokenizer says what is wrong
                continue
    else:
        return None
    return found if "tokenizer.json" in found else None


def _template(wanted: str | None, config: Mapping[str, Any], step_dir: Path | None, key: str) -> str | None:
    if wanted is None:
        return PASSTHROUGH
    if wanted.lower() == "default":
        own = config.get("chat_template")
        if isinstance(own, list):  # older files: [{name, template}]
            own = {entry["name"]: entry["template"] for entry in own}
        return own.get("default") if isinstance(own, dict) else own
    if not wanted.endswith(".jinja"):
        return wanted
    path = resolve_path(wanted, step_dir, f"{key}.chat_template")
    if not path.is_file():
        raise UserError(f"no such file: {path}", where=f"{key}.chat_template")
    return path.read_text(encoding="utf-8")


def _specials(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by the names that templates use (bos_token, …)."""
    named = {name: value for name, value in config.items() if name.endswith("_token") and value}
    texts = {name: value.get("content") if isinstance(value, Mapping) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _compile(template: str) -> Any:
    """A chat template as transformers compiles it."""
    from datetime import datetime

    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment.from_string(template)
