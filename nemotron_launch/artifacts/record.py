"""What a finished run made, and of what: `artifacts.json` beside it, written by the run, read by the launcher.

Imports no torch: data preparation and the launcher use it too. The file, all paths absolute:

    {"format": 1, "step": "sft/megatron", "config_sha256": …, "created": seconds since 1970,
     "artifacts": [{"type", "key", "path", "relative", "checkpoint", "content", "tokens", "architecture"}],
     "inputs": [{"type", "key", "value", "path", "content", "record"}],
     "code": {"version", "git_revision", "bundle"}, "metrics": {name: value}}
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from nemotron_launch.artifacts import RECORD, identity, records_around
from nemotron_launch.artifacts.code_version import code_of
from nemotron_launch.artifacts.content import content_of, file_hash
from nemotron_launch.artifacts.identity import Tokens
from nemotron_launch.catalog import Port, load_step
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import field, frozen
from nemotron_launch.trainer.checkpoints import newest_complete
from nemotron_launch.trainer.paths import is_hub_id, resolve_path

log = logging.getLogger(__name__)
FILE = RECORD
FORMAT = 1
_SOURCES = 200  # of a manifest that are recorded
_TAIL = 1 << 16  # bytes of metrics.jsonl's end


@frozen
class Made:
    """An artifact that a run made.

    path: the folder or file that its config key names. checkpoint: which one it is, in a folder of step_N.
    content: sha256 of what tells this content from another: a manifest, training_info.json, sizes and ends of weights.
    tokens, architecture: of the model, or the tokenizer that measured the rows; None where it has none.
    """

    type: str
    key: str
    path: str
    checkpoint: str = ""
    content: str = ""
    tokens: Tokens | None = None
    architecture: Mapping[str, Any] | None = None

    @property
    def place(self) -> str:
        """The path of exactly this content: a step_N or the model in it, the file or folder itself of the rest."""
        return os.path.join(self.path, self.checkpoint) if self.checkpoint else self.path


@frozen
class Used:
    """An artifact that a run consumed. value: as its config has it; path: absolute, empty for a hub id.

    content: as Made's, or the sha256 of a file. record: digest of the record of the run that made it, where it has one.
    """

    type: str
    key: str
    value: str
    path: str = ""
    content: str = ""
    record: str = ""


@frozen
class Record:
    """What `artifacts.json` says. digest: sha256 of the file. folder: where it lies, the run's output folder."""

    step: str
    config_sha256: str
    created: float
    artifacts: tuple[Made, ...]
    inputs: tuple[Used, ...] = ()
    code: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    digest: str = ""
    folder: str = ""


def register(
    step_dir: Path,
    config: Mapping[str, Any],
    *,
    config_path: Path,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Write the record of a run that has finished into its output folder, in one go; its path. Call it on one process.

    step_dir: the step's folder, whose manifest names the ports. config: the composed one that the step read from
    config_path. metrics: what the run came to (default: the last numbers of its metrics.jsonl). A run that is run
    again and finds that it had finished leaves the record as it was. UserError: it cannot be written.
    """
    folder = Path(str(config["output_dir"])).expanduser().absolute()
    path = folder / FILE
    made = tuple(_made(step_dir, config, folder))
    used = (*_used(step_dir, config), *_blended(made))
    config_sha256 = _config_hash(config_path)
    with contextlib.suppress(UserError):
        old = read(path)
        if old and made and (old.config_sha256, old.inputs, _core(old.artifacts)) == (config_sha256, used, _core(made)):
            return path
    record = Record(
        step=load_step(step_dir).id,
        config_sha256=config_sha256,
        created=time.time(),
        artifacts=made,
        inputs=used,
        code=code_of(config_path),
        metrics=_finite(metrics if metrics is not None else last_metrics(folder)),
        folder=str(folder),
    )
    _write(path, as_bytes(record))
    return path


def register_finished(step_dir: Path, config: Mapping[str, Any], *, config_path: Path) -> None:
    """`register` at the end of a step, which has finished whatever comes of it: what cannot be written is a warning."""
    try:
        register(step_dir, config, config_path=config_path)
    except (UserError, OSError) as error:
        log.warning("what this run made is not recorded: %s", str(error).removeprefix("error: "))


def read(path: Path) -> Record | None:
    """The record of a run: the file itself or its folder; None where there is none. UserError: it is not one."""
    file = path / FILE if path.is_dir() else path
    try:
        data = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"cannot be read: {(error.strerror or str(error)).lower()}", where=str(file)) from None
    return parse(data, str(file.parent.absolute()))


def as_bytes(record: Record) -> bytes:
    """The file of a record."""
    data = {
        "format": FORMAT,
        "step": record.step,
        "config_sha256": record.config_sha256,
        "created": record.created,
        "artifacts": [_made_data(one, Path(record.folder)) for one in record.artifacts],
        "inputs": [vars(one) for one in record.inputs],
        "code": dict(record.code),
        "metrics": dict(record.metrics),
    }
    return (json.dumps(data, indent=1) + "\n").encode("utf-8", "surrogatepass")


def parse(data: bytes, folder: str, *, digest: str = "") -> Record:
    """A record from its bytes. folder: where it lies, also on another machine. UserError: it is not one.

    digest: of the file from which the bytes were made, where they are not that file's.
    """
    where = os.path.join(folder, FILE)
    try:
        body = json.loads(data)
        if body["format"] > FORMAT:
            raise UserError("was written by a newer nemotron", where=where, hint="update nemotron")
        return Record(
            step=str(body["step"]),
            config_sha256=str(body["config_sha256"]),
            created=float(body["created"]),
            artifacts=tuple(_read_made(one, folder) for one in body["artifacts"]),
            inputs=tuple(Used(**one) for one in body["inputs"]),
            code=dict(body["code"]),
            metrics=dict(body["metrics"]),
            digest=digest or sha256(data).hexdigest(),
            folder=folder,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        hint = f"{type(error).__name__}: {error}; the run's command, run again, writes it anew once it is removed"
        raise UserError("is not a record of artifacts", where=where, hint=hint) from None


def find(path: Path) -> tuple[Record, tuple[Made, ...]] | None:
    """The record of what lies at a path, in the folder itself or around it, with those of its artifacts that are meant.

    A run's output folder means all that it made; a step_N or a weights folder the checkpoints in which it lies.
    """
    here = Path(os.path.abspath(path))
    for folder in map(Path, records_around(str(path))):
        record = read(folder)
        meant = tuple(one for one in record.artifacts if _concerns(one, here, folder)) if record else ()
        if record and meant:
            return record, meant
    return None


def is_there(made: Made) -> str:
    """What has become of an artifact on this machine: "" as it was made, "gone", or "replaced" by other content."""
    place = Path(made.place)
    if not place.exists():
        return "gone"
    return "replaced" if made.content and content_of(place) != made.content else ""


def last_metrics(folder: Path) -> dict[str, float]:
    """The last value of each metric near the end of a run's metrics.jsonl."""
    found: dict[str, float] = {}
    with contextlib.suppress(OSError), (folder / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
        for line in file.read().splitlines():
            with contextlib.suppress(ValueError):
                values = json.loads(line)
                if isinstance(values, dict):
                    found |= {name: value for name, value in values.items() if name.startswith(("train/", "valid"))}
                    found |= {name: values[name] for name in ("step",) if name in values}
    return found


# What a run made and used ------------------------------------------------------------------------------------------


def _made(step_dir: Path, config: Mapping[str, Any], folder: Path) -> Iterator[Made]:
    for port in load_step(step_dir).produces:
        value = _get(config, port.key)
        if not isinstance(value, str):
            continue
        path = Path(os.path.abspath(Path(value).expanduser()))
        newest = newest_complete(path)
        if not path.exists() or (port.type == "checkpoint_megatron" and newest is None):
            continue
        holder = newest or path
        model = holder / "hf" if port.type == "checkpoint_hf" and (holder / "hf").is_dir() else holder
        yield Made(
            port.type,
            port.key,
            str(path),
            str(model.relative_to(path)) if newest else "",
            content_of(model),
            _tokens(holder, config, step_dir),
            _architecture(holder),
        )


def _tokens(holder: Path, config: Mapping[str, Any], step_dir: Path) -> Tokens | None:
    """The tokenizer beside a model; by its files where they are there, by its name in the config besides."""
    named = identity.of_config(config, step_dir)
    for folder in (holder / "policy" / "tokenizer", holder / "hf", holder):
        if folder.is_dir() and (own := identity.of_folder(folder)).tokenizer:
            return Tokens(named.name if named else "", own.tokenizer, own.chat_template, _setting(named))
    return named


def _setting(named: Tokens | None) -> str | None:
    return named.setting if named else identity.DEFAULT


def _architecture(holder: Path) -> Mapping[str, Any] | None:
    import dataclasses

    from nemotron_launch.trainer.architecture import hf_architecture, read_architecture

    with contextlib.suppress(UserError, OSError, ValueError):
        if stored := read_architecture(holder / "policy"):
            return dataclasses.asdict(stored)
        for folder in (holder, holder / "hf"):
            if (folder / "config.json").is_file():
                config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
                return dataclasses.asdict(hf_architecture(config, where=str(folder)))
    return None


def _used(step_dir: Path, config: Mapping[str, Any]) -> Iterator[Used]:
    for port in load_step(step_dir).consumes:
        value = _get(config, port.key)
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, str) and entry:
                yield _one_used(port, entry, step_dir)


def _one_used(port: Port, value: str, step_dir: Path) -> Used:
    path = Path(os.path.abspath(resolve_path(value, step_dir, port.key)))
    if not path.exists():
        return Used(port.type, port.key, value, "" if is_hub_id(value) else str(path))
    digest = ""
    with contextlib.suppress(UserError):
        if found := find(path):
            digest = found[0].digest
    return Used(port.type, port.key, value, str(path), content_of(path), digest)


def _blended(made: Sequence[Made]) -> Iterator[Used]:
    """The sources that a manifest of data_prep/rl_prep names: files by path, datasets of the hub by id."""
    for one in made:
        if one.type != "prepared_jsonl":
            continue
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            entries = [
                (str(source["name"]), str(value))
                for source in json.loads(Path(one.path).read_text(encoding="utf-8"))["sources"]
                for _, value in source["entries"]
            ]
            for name, value in entries[:_SOURCES]:
                yield _one_used(Port("raw_jsonl", False, f"blend: {name}", ""), value, Path())


def _get(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for segment in key.split("."):
        value = value.get(segment) if isinstance(value, Mapping) else None
    return value


def _config_hash(path: Path) -> str:
    """As the ledger has it: sha256 of the config's text."""
    try:
        return file_hash(path)
    except OSError:
        return ""


# The file ----------------------------------------------------------------------------------------------------------


def _made_data(made: Made, folder: Path) -> dict[str, Any]:
    path = Path(made.path)
    relative = str(path.relative_to(folder)) if path.is_relative_to(folder) else ""
    return {**vars(made), "tokens": vars(made.tokens) if made.tokens else None, "relative": relative}


def _read_made(data: Mapping[str, Any], folder: str) -> Made:
    """An artifact of a record; one that lies in the run's folder lies there still when that has moved."""
    values = dict(data)
    relative, tokens = values.pop("relative"), values.pop("tokens")
    path = os.path.normpath(os.path.join(folder, relative)) if relative else values["path"]
    known = {name: value for name, value in values.items() if name in Made.__dict__["__dataclass_fields__"]}
    return Made(**{**known, "path": path, "tokens": Tokens(**tokens) if tokens else None})


def _core(made: Sequence[Made]) -> list[tuple[str, ...]]:
    """What tells whether a run made something anew."""
    return [(one.key, one.path, one.checkpoint, one.content) for one in made]


def _concerns(made: Made, here: Path, folder: Path) -> bool:
    path = Path(made.path)
    return here == folder or path == here or path in here.parents


def _finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Numbers that JSON can hold."""
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _write(path: Path, data: bytes) -> None:
    passing = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with passing.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        passing.replace(path)
    except OSError as error:
        for file in (passing, path):  # an older one would speak of what is no longer there
            with contextlib.suppress(OSError):
                file.unlink()
        reason = (error.strerror or str(error)).lower()
        hint = "the artifacts themselves are there; the same command, run again, records them"
        raise UserError(f"cannot be written: {reason}", where=str(path), hint=hint, exit_code=1) from None
