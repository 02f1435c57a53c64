"""Which tokenizer, chat template and architecture a folder or a config means, read from its files alone.

A step's own fingerprint of its tokenizer needs transformers; the launcher must tell tokenizers apart without it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from nemotron_launch.frozen import frozen

BYTES = "bytes"  # the byte-level tokenizer's name
DEFAULT = "default"  # policy.tokenizer.chat_template: the tokenizer's own
_TEMPLATE = "chat_template.jinja"
_RULES = ("normalizer", "pre_tokenizer", "model")  # of tokenizer.json, what decides ids besides the added tokens
_ADDED = ("id", "content", "special", "normalized", "lstrip", "rstrip", "single_word")
# As trainer/tokenizer.py has it.
_PASSTHROUGH = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
_NONE = "none"


@frozen
class Tokens:
    """A tokenizer and its chat template. Hashes are empty where the files that tell them cannot be read from here.

    name: as the config has it. tokenizer: sha256 over all that decides ids. chat_template: sha256 of the template's
    text, "none" where there is none. setting: what the config says of the template.
    """

    name: str = ""
    tokenizer: str = ""
    chat_template: str = ""
    setting: str | None = DEFAULT

    def as_data(self) -> dict[str, Any]:
        return dict(vars(self))


def of_config(config: Mapping[str, Any], step_dir: Path | None = None, *, cwd: Path | None = None) -> Tokens | None:
    """The tokenizer that a composed config names, in `policy.tokenizer` or `tokenizer`; None where it names none.

    step_dir: what `step://` means. cwd: where relative paths start. Only files are read, no hub is asked.
    """
    policy = config.get("policy")
    section = policy.get("tokenizer") if isinstance(policy, Mapping) else config.get("tokenizer")
    if not isinstance(section, Mapping):
        return None
    name = section.get("name") or (policy.get("model_name") if isinstance(policy, Mapping) else None)
    if not name:
        return None
    setting = section.get("chat_template", DEFAULT)
    folder = folder_of(str(name), step_dir, cwd)
    own = of_folder(folder) if folder else Tokens(tokenizer=bytes_hash(), chat_template=_NONE)
    if name != BYTES and folder is None:
        own = Tokens()
    template = own.chat_template
    if setting is None:
        template = text_hash(_PASSTHROUGH)
    elif str(setting).lower() != DEFAULT:
        template = _written(str(setting), step_dir, cwd)
    return Tokens(str(name), own.tokenizer, template, None if setting is None else str(setting))


def of_folder(folder: Path) -> Tokens:
    """The tokenizer that lies in a folder, with the template that it has."""
    return Tokens("", _tokenizer_hash(folder), _template_hash(folder))


def text_hash(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def bytes_hash() -> str:
    """The byte-level tokenizer's: ids 0-255 are the bytes, in GPT-2's characters, then <pad>, <bos> and <eos>."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    vocab = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    added = [
        {"id": 256 + n, "content": token, "special": True, "normalized": False, "lstrip": False, "rstrip": False,
         "single_word": False}
        for n, token in enumerate(("<pad>", "<bos>", "<eos>"))
    ]  # fmt: skip
    return _hash_of(
        {
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        }
    )


def _tokenizer_hash(folder: Path) -> str:
    try:
        return _hash_of(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    for name in ("tokenizer.model", "spiece.model", "vocab.json"):
        try:
            return sha256((folder / name).read_bytes()).hexdigest()
        except OSError:
            continue
    return ""


def _hash_of(rules: Mapping[str, Any]) -> str:
    """Only what is set counts: versions of the library write more or fewer fields that are null or false."""
    model = {key: value for key, value in rules["model"].items() if value or key in ("vocab", "merges")}
    added = [{key: token.get(key, False) for key in _ADDED} for token in rules.get("added_tokens") or []]
    what = [added, *(rules.get(name) for name in _RULES if name != "model"), model]
    return sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _template_hash(folder: Path) -> str:
    try:
        return text_hash((folder / _TEMPLATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        pass
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    template = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(template, list):  # several, by name
        template = next((one.get("template") for one in template if one.get("name") == "default"), None)
    return text_hash(template) if isinstance(template, str) else _NONE


def _written(setting: str, step_dir: Path | None, cwd: Path | None) -> str:
    """The hash of a template that a config writes out, or whose file it names; empty where that is not here."""
    if not setting.endswith(".jinja"):
        return text_hash(setting)
    try:
        return text_hash(_path(setting, step_dir, cwd).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""


def folder_of(name: str, step_dir: Path | None, cwd: Path | None = None) -> Path | None:
    """The folder of a model or tokenizer: a path, or a hub id in the local cache; None where it is not here."""
    if name == BYTES:
        return None
    path = _path(name, step_dir, cwd)
    if path.is_dir():
        return path
    home = os.environ.get("HF_HUB_CACHE") or f"{os.environ.get('HF_HOME') or '~/.cache/huggingface'}/hub"
    kept = Path(home).expanduser() / f"models--{name.replace('/', '--')}"
    try:
        snapshot = kept / "snapshots" / (kept / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return snapshot if snapshot.is_dir() else None


def _path(text: str, step_dir: Path | None, cwd: Path | None) -> Path:
    if text.startswith("step://") and step_dir is not None:
        return step_dir / text.removeprefix("step://")
    return (cwd or Path()) / Path(text).expanduser()
