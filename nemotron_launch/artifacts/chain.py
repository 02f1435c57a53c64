"""What must agree where a step's artifact goes into another step: its type, tokenizer, chat template, architecture.

Only what is known for certain is refused: of a tokenizer that lies on another machine a step itself finds out at its
start. Two entries: `check_link` for a maker that has not run yet (a stage of a pipeline), `check_made` for an artifact
with a record.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from nemotron_launch.artifacts import identity
from nemotron_launch.artifacts.identity import BYTES, DEFAULT, Tokens
from nemotron_launch.artifacts.record import Made
from nemotron_launch.catalog import Port, Step, conversion, is_a, load_artifacts
from nemotron_launch.config.compose import Composed
from nemotron_launch.errors import UserError
from nemotron_launch.trainer.data.manifest import check_rows_for
from nemotron_launch.trainer.paths import is_hub_id

ALLOW = "run.allow_other_tokenizer"
_OTHER_MODELS = ("env",)  # sections whose models are not the policy: judges and reward models
_WEIGHTS = "policy/weights/iter_0000000"


class Typed(Protocol):
    """Anything of an artifact type that a config key names: a manifest's port, an artifact that was made."""

    @property
    def type(self) -> str: ...
    @property
    def key(self) -> str: ...


T = TypeVar("T", bound=Typed)


def check_link(
    made_step: Step, made_config: Composed, port_type: str, used_step: Step, used_config: Composed, key: str
) -> None:
    """Raise where what a step will make, by its config, does not fit the key of a later step's config.

    port_type: the type of what made_step produces (see `choose`). key: of one of used_step's consumed ports. UserError:
    the types do not fit, with the converting step where there is one; tokenizer, chat template or architecture differ,
    with both values. A tokenizer that only the job's machine can read is not compared.
    """
    what = f"what {made_step.id} -c {made_config.name} makes"
    where = used_config.sources.where(key)
    check_type(port_type, used_step, key, what=what, where=where)
    if port_type == "prepared_jsonl":
        check_rows_for(made_config.get("target"), used_step.id, what=f"{what} are rows", where=where)
    made = Made(
        port_type,
        key,
        "",
        tokens=identity.of_config(made_config.data, made_step.folder),
        architecture=_shape(made_config.data, made_step.folder),
    )
    check_made(made, used_step, used_config, key, what=what)


def choose(made: Sequence[T], step: Step, key: str, *, what: str, where: str | None = None, named: str = "") -> T:
    """Of what a run made, or will make, that which a key of this step's config asks for: of its type, else a subtype.

    what: how messages call the run. named: how the config named it, for the convert command. UserError: nothing fits,
    or several do.
    """
    types, ports = load_artifacts(), _ports(step, key)
    for fits in (
        [one for one in made if any(one.type == port.type for port in ports)],
        [one for one in made if any(is_a(types, one.type, port.type) for port in ports)],
    ):
        if len(fits) == 1:
            check_type(fits[0].type, step, key, what=what, where=where, named=named)
            return fits[0]
        if fits:
            listed = "\n".join(f"{one.type} at {one.key}" + _shown(one, key) for one in fits)
            raise UserError(f"{key}: {what} made {len(fits)} artifacts that fit", where=where, hint=listed)
    if not made:
        raise UserError(f"{key}: {what} made no artifact", where=where)
    check_type(made[0].type, step, key, what=what, where=where, named=named)
    return made[0]


def check_type(made_type: str, step: Step, key: str, *, what: str, where: str | None, named: str = "") -> None:
    """Raise where an artifact of this type cannot be consumed at a key of a step's config; as `choose` for the rest."""
    types, ports = load_artifacts(), _ports(step, key)
    if not ports:
        keys = ", ".join(port.key for port in step.consumes) or "nowhere"
        raise UserError(f"{step.id} consumes no artifact at {key}", where=where, hint=f"it does at {keys}")
    if any(port.type == made_type for port in ports):
        return
    elsewhere = next((port.key for port in step.consumes if port.type == made_type), None)
    fits = any(is_a(types, made_type, port.type) for port in ports)
    if fits and elsewhere is None:
        return
    convert = next((text for port in ports if (text := conversion(made_type, port.type, named))), None)
    hint = f"{elsewhere}={named or '…'} takes it" if elsewhere else None
    hint = hint if fits else convert or hint
    raise UserError(f"{key} takes a {ports[0].type}; {what} is a {made_type}", where=where, hint=hint)


def check_made(made: Made, step: Step, composed: Composed, key: str, *, what: str, named: str = "") -> None:
    """Raise where a config uses an artifact with another tokenizer, chat template or architecture than it was made
    with. what: how messages call it. named: how the config named it.

    `run.allow_other_tokenizer` lets rows and weights be used with another tokenizer on purpose. So does a path of the
    weights alone (…/policy/weights/iter_0000000): it is as if they had none.
    """
    if key.partition(".")[0] in _OTHER_MODELS or named.rstrip("/").rpartition("/")[2].startswith("iter_"):
        return
    if not composed.get(ALLOW) and not _same_place(made, composed):
        _check_tokens(made, step, composed, key, what)
    if made.architecture and isinstance(composed.data.get("policy"), Mapping):
        _check_shape(made.architecture, step, composed, key, what)


# Tokenizers --------------------------------------------------------------------------------------------------------


def _check_tokens(made: Made, step: Step, composed: Composed, key: str, what: str) -> None:
    ours, theirs = identity.of_config(composed.data, step.folder), made.tokens
    if ours is None or theirs is None:
        return
    section = "policy.tokenizer" if isinstance(composed.data.get("policy"), Mapping) else "tokenizer"
    rows = is_a(load_artifacts(), made.type, "training_jsonl")
    verb = "was measured with" if rows else "was trained with"
    if _tokenizers_differ(ours, theirs):
        _refuse(made, composed, key, f"{section}.name", ours.name, f"{what} {verb} {_called(theirs)}", rows)
    if not rows and _templates_differ(ours, theirs):
        said = _template(ours), f"{what} was trained with {_template(theirs)}"
        _refuse(made, composed, key, f"{section}.chat_template", *said, rows)


def _tokenizers_differ(ours: Tokens, theirs: Tokens) -> bool:
    if ours.tokenizer and theirs.tokenizer:
        return ours.tokenizer != theirs.tokenizer
    # No tokenizer of the hub is the byte-level one; a folder that cannot be read from here may hold it.
    one, other = sorted((ours, theirs), key=lambda tokens: tokens.tokenizer != identity.bytes_hash())
    return one.tokenizer == identity.bytes_hash() and other.name != BYTES and is_hub_id(other.name)


def _templates_differ(ours: Tokens, theirs: Tokens) -> bool:
    if ours.chat_template and theirs.chat_template:
        return ours.chat_template != theirs.chat_template
    # What one of them is cannot be read from here; that texts are joined as they are is no tokenizer's own template.
    settings = {ours.setting, theirs.setting}
    return None in settings and DEFAULT in settings


def _called(tokens: Tokens) -> str:
    return tokens.name or f"another tokenizer ({tokens.tokenizer[:12]})"


def _template(tokens: Tokens) -> str:
    if tokens.setting is None:
        return "null (texts joined as they are)"
    text = tokens.setting if len(tokens.setting) <= 40 else f"{tokens.setting[:40]}…"
    if tokens.setting == DEFAULT and tokens.chat_template == "none":
        return "default (the tokenizer has none)"
    return f"{text!r} ({tokens.chat_template[:12]})" if tokens.chat_template else repr(text)


def _refuse(made: Made, composed: Composed, key: str, at: str, ours: str, theirs: str, rows: bool) -> None:
    hints = [f"consumed at {key} ({composed.sources.where(key)})"]
    if made.path and not rows:
        own = f"{made.place}/policy/tokenizer" if made.type == "checkpoint_megatron" else made.place
        hints += [f"use its own: policy.tokenizer.name={own} policy.tokenizer.chat_template=default"]
    if made.type == "checkpoint_megatron":
        hints += [f"or, to train its weights with another on purpose: {ALLOW}=true"]
    else:
        hints += [f"to use it with another on purpose: {ALLOW}=true"]
    raise UserError(f"{at}: {ours} here, but {theirs}", where=composed.sources.where(at), hint="\n".join(hints))


def _same_place(made: Made, composed: Composed) -> bool:
    """Whether the config takes the tokenizer that lies with the artifact itself."""
    named = composed.get("policy.tokenizer.name")
    return bool(made.path) and isinstance(named, str) and Path(named).is_relative_to(made.path)


# Architectures -----------------------------------------------------------------------------------------------------


def _check_shape(made: Mapping[str, Any], step: Step, composed: Composed, key: str, what: str) -> None:
    ours = _shape(composed.data, step.folder)
    if not ours:
        return
    from nemotron_launch.trainer.architecture import Architecture, differences

    # The tokenizer's size where none is written, and those have been compared.
    vocab = {"vocab_size": 0} if not (ours["vocab_size"] and made["vocab_size"]) else {}
    fields = differences(Architecture(**{**made, **vocab}), Architecture(**{**ours, **vocab}))
    if not fields:
        return
    name = "policy.model_name" if composed.get("policy.model_name") else "policy.architecture"
    lines = [line.replace(" in the checkpoint,", " there,").replace(" in the config", " here") for line in fields]
    hint = "\n".join([*lines, f"consumed at {key} ({composed.sources.where(key)})"])
    raise UserError(f"{name}: another shape than {what}:", where=composed.sources.where(name), hint=hint)


def _shape(config: Mapping[str, Any], step_dir: Path | None) -> dict[str, Any] | None:
    """The architecture that a config asks for, vocab_size 0 where the tokenizer says it; None where it is not known."""
    import dataclasses

    from nemotron_launch.trainer.architecture import hf_architecture, inline_architecture

    policy = config.get("policy")
    if not isinstance(policy, Mapping):
        return None
    try:
        if policy.get("model_name"):
            folder = identity.folder_of(str(policy["model_name"]), step_dir)
            if folder is None or not (folder / "config.json").is_file():
                return None
            text = (folder / "config.json").read_text(encoding="utf-8")
            return dataclasses.asdict(hf_architecture(json.loads(text), where=str(folder)))
        section = policy.get("architecture")
        if not section:
            return None
        shape = inline_architecture(section, tokenizer_vocab_size=section.get("vocab_size") or 1)
        return dataclasses.asdict(shape) | {"vocab_size": section.get("vocab_size") or 0}
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return None  # said by the checks of the config itself


# Types -------------------------------------------------------------------------------------------------------------


def _ports(step: Step, key: str) -> list[Port]:
    return [port for port in step.consumes if port.key == key]


def _shown(one: Typed, key: str) -> str:
    path = getattr(one, "path", "")
    return f":  {key}={path}" if path else ""
