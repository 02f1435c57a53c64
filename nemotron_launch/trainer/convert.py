"""The steps convert/hf_to_megatron and convert/megatron_to_hf: weights bit for bit, and both sides' logits compared.

A tensor or a layer is in memory at a time; whole models are loaded for the comparison only, one side after the other.
"""

from __future__ import annotations

import logging
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from torch import Tensor

from nemotron_launch import __version__
from nemotron_launch.config import checks
from nemotron_launch.errors import UserError
from nemotron_launch.trainer import doctor, exit_codes, hf, logit_check, megatron_bridge
from nemotron_launch.trainer.agreement import on_rank_0, together
from nemotron_launch.trainer.architecture import FAMILIES, Architecture, differences, read_architecture
from nemotron_launch.trainer.checkpoints import (
    WEIGHTS,
    CheckpointStore,
    newest_complete,
    read_info,
    resolve_checkpoint,
    weights_dir,
)
from nemotron_launch.trainer.file_errors import why_not_written
from nemotron_launch.trainer.hf import read_json
from nemotron_launch.trainer.hf_folders import (
    FolderWriter,
    config_of,
    copy_tokenizer,
    has_tokenizer,
    write_json,
)
from nemotron_launch.trainer.megatron import checkpoint_tensors, parallel
from nemotron_launch.trainer.megatron.checkpoint import WRITE_ERRORS
from nemotron_launch.trainer.megatron.parallel import Layout
from nemotron_launch.trainer.paths import resolve_path
from nemotron_launch.trainer.process import Config, run_process
from nemotron_launch.trainer.tokenizer import Tokenizer
from nemotron_launch.trainer.warm_start import fingerprint_folder, model_folder

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, None: None}
UNTRAINED = {
    **dict.fromkeys(("epoch", "step", "total_steps", "step_in_epoch", "consumed_samples", "total_valid_tokens"), 0),
    "save_optimizer": False,
}
RECORD = "conversion.json"  # beside the weights of a converted folder: from what it was made, and how well


def hf_to_megatron(step_dir: Path, argv: list[str] | None = None) -> int:
    """Entry point of convert/hf_to_megatron; returns an exit code of `exit_codes`."""
    _leave_on_signals()
    return run_process(step_dir, lambda config: to_megatron(config, step_dir), argv)


def megatron_to_hf(step_dir: Path, argv: list[str] | None = None) -> int:
    """Entry point of convert/megatron_to_hf; returns an exit code of `exit_codes`."""
    _leave_on_signals()
    return run_process(step_dir, lambda config: to_hf(config, step_dir), argv)


# From Hugging Face -------------------------------------------------------------------------------------------------


def to_megatron(config: Config, step_dir: Path) -> int:
    """Convert as the composed config of convert/hf_to_megatron says; all processes call it."""
    layout = _start(config, "convert/hf_to_megatron")
    named, target = config["hf_path"], Path(config["megatron_path"])

    def find() -> Path:
        return model_folder(named, step_dir=step_dir, where="hf_path").absolute()

    on_rank_0(find)  # what comes from the hub comes once a machine's cache
    folder = together(find)
    kind = together(lambda: read_json(folder / "config.json").get("model_type"))
    if kind is not None and kind not in FAMILIES:
        return _by_bridge(
            f"{named} (model type {kind})", "hf_path",
            lambda bridge: megatron_bridge.to_megatron(
                bridge, folder, target, dtype=DTYPES[config["precision"]], trust_remote_code=config["trust_remote_code"]
            ),
        )  # fmt: skip
    a = together(lambda: hf.read_config(folder))
    stored = together(lambda: hf.open_weights(folder, a))
    dtypes = together(lambda: {name: stored.dtype(name) for name in hf.hf_names(a)})
    _check_layout(a, layout)
    store = CheckpointStore(target, keep_top_k=None, save_period=1, metric_name=None, higher_is_better=False)
    origin = on_rank_0(lambda: _origin(config, folder, fingerprint_folder(folder, suffix=".safetensors")))
    if on_rank_0(lambda: _made_before(newest_complete(target), target, origin, "conversion")):
        return exit_codes.FINISHED
    _say(f"{folder} → {target}", a, dtypes.values())
    on_rank_0(lambda: _begin(store))
    temporary = store.tmp_path(0)
    try:
        _write_weights(temporary / WEIGHTS, a, layout, stored, dtypes, DTYPES[config["precision"]])
        tokens, ids = on_rank_0(lambda: _carry(config, folder, temporary, a))
        found = _compare(config, temporary / WEIGHTS, folder, a, layout, ids)
        info = {**UNTRAINED, "tokenizer": tokens, "conversion": origin | found}
        on_rank_0(lambda: str(store.commit(0, info)))
    finally:
        if layout.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
    log.info("wrote %s", target / "step_0")
    return exit_codes.FINISHED


def _write_weights(
    folder: Path,
    a: Architecture,
    layout: Layout,
    stored: hf.StoredWeights,
    dtypes: Mapping[str, torch.dtype],
    precision: torch.dtype | None,
) -> None:
    def value(name: str) -> Tensor:
        return hf.from_hf(name, 0, a, stored)

    def shape(name: str) -> Tensor:
        return torch.empty(hf.hf_shape(name, a), dtype=dtypes[name], device="meta")

    def dtype(kind: str) -> torch.dtype:
        """The type of a kind of parameter: that of all its layers, which are stored together."""
        names = [name for group in hf.parameter_names(a) for name in group if name.endswith(kind)]
        names = names or [kind]  # the output layer of a last stage whose weights are tied
        return precision or reduce(torch.promote_types, (hf.from_hf(name, 0, a, shape).dtype for name in names))

    try:
        checkpoint_tensors.write(folder, a, layout, value, dtype)
    except WRITE_ERRORS as error:
        raise UserError(
            f"could not be written: {why_not_written(error, folder.parent)}",
            where=str(folder.parents[3]),
            hint="nothing was left there",
            exit_code=exit_codes.FAILED,
        ) from error


def _begin(store: CheckpointStore) -> None:
    store.clean()
    (store.begin(0) / WEIGHTS).mkdir(parents=True)


def _carry(config: Config, folder: Path, temporary: Path, a: Architecture) -> tuple[str | None, Any]:
    """What belongs to the weights: config, architecture, tokenizer. Its fingerprint, and the probe text's ids."""
    policy = temporary / "policy"
    a.write(policy)
    shutil.copyfile(folder / "config.json", policy / "config.json")
    (temporary / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True), "utf-8")
    tokenizer = None
    if has_tokenizer(folder):
        tokenizer = Tokenizer.from_folder(folder)
        copy_tokenizer(folder, policy / "tokenizer")
    else:
        log.warning("%s has no tokenizer: the checkpoint has none either", folder)
    return tokenizer.fingerprint if tokenizer else None, logit_check.probe_ids(config["probe_text"], tokenizer, a)


# To Hugging Face ---------------------------------------------------------------------------------------------------


def to_hf(config: Config, step_dir: Path) -> int:
    """Convert as the composed config of convert/megatron_to_hf says; all processes call it."""
    layout = _start(config, "convert/megatron_to_hf")
    target = Path(config["hf_path"])

    def find() -> tuple[Path, Path, Path | None]:
        path = resolve_path(config["megatron_path"], step_dir, "megatron_path")
        found = resolve_checkpoint(path, where="megatron_path").absolute()
        like = config["hf_model_id"]
        return (
            found,
            weights_dir(found),
            model_folder(like, step_dir=step_dir, where="hf_model_id").absolute() if like else None,
        )

    found, weights, like = on_rank_0(find)
    a = on_rank_0(lambda: _architecture(weights, like))
    if a is None:
        assert like is not None
        return _by_bridge(
            like.name, "hf_model_id",
            lambda bridge: megatron_bridge.to_hf(
                bridge, weights, like, target, trust_remote_code=config["trust_remote_code"]
            ),
        )  # fmt: skip
    _check_layout(a, layout)
    origin = on_rank_0(lambda: _origin(config, found, fingerprint_folder(weights)))
    if on_rank_0(lambda: _made_before(target if target.exists() else None, target, origin, None)):
        return exit_codes.FINISHED
    made: list[FolderWriter] = []  # on rank 0
    try:
        ids = on_rank_0(lambda: _write_folder(config, weights, like, a, target, made))
        temporary = target.with_name(f"tmp_{target.name}")
        agreed = _compare(config, weights, temporary, a, layout, ids)

        def publish() -> None:
            write_json(temporary / RECORD, origin | agreed)
            made[0].publish()

        on_rank_0(publish)
    finally:
        for writer in made:
            writer.remove()
    log.info("wrote %s", target)
    return exit_codes.FINISHED


def _architecture(weights: Path, like: Path | None) -> Architecture | None:
    """The checkpoint's, by its own file or by a model of the same; None where Megatron-Bridge must be asked."""
    own = read_architecture(weights.parent.parent)
    if own is not None:
        return own
    if like is None:
        raise UserError(
            "says nothing of its architecture: there is no architecture.json beside it",
            where=str(weights),
            hint="name a Hugging Face model of the same architecture:  hf_model_id=…",
        )
    kind = read_json(like / "config.json").get("model_type")
    return None if kind is not None and kind not in FAMILIES else hf.read_config(like)


def _write_folder(
    config: Config, weights: Path, like: Path | None, a: Architecture, target: Path, made: list[FolderWriter]
) -> Any:
    """Everything of the folder but its name and record; the writer goes into `made`. The probe text's ids."""
    stored = checkpoint_tensors.StoredTensors(weights, a)
    dtypes = {
        name: DTYPES[config["precision"]] or part.dtype
        for group in hf.parameter_names(a)
        for parameter in group
        for name, part in hf.to_hf(parameter, stored.shape(parameter), a)
    }
    _say(f"{weights} → {target}", a, dtypes.values())
    writer = FolderWriter(target, a, dtypes, max_file_bytes=config["max_file_bytes"])
    made.append(writer)
    for group in hf.parameter_names(a):
        for parameter, value in stored.read(group).items():
            for name, part in hf.to_hf(parameter, value, a):
                writer.add(name, part)
    policy = weights.parent.parent
    places = [policy / "tokenizer", *([like] if like else [])]
    source = next((place for place in places if has_tokenizer(place)), None)
    tokenizer = None
    if source is None:
        log.warning("%s has no tokenizer: the model has none either; hf_model_id may name one that has", policy)
    else:
        copy_tokenizer(source, writer.temporary)
        tokenizer = Tokenizer.from_folder(writer.temporary)
    special = read_json(writer.temporary / "generation_config.json")
    writer.finish(_config(a, dtypes, special, (policy, like)))
    return logit_check.probe_ids(config["probe_text"], tokenizer, a)


def _config(
    a: Architecture, dtypes: Mapping[str, torch.dtype], special: Mapping[str, Any], places: Sequence[Path | None]
) -> dict[str, Any]:
    """config.json: the one that the model came with, where it came from Hugging Face, else ours."""
    ours = config_of(a, dtypes.values(), special)
    for place in places:
        carried = read_json(place / "config.json") if place else {}
        if carried and not differences(hf.read_config(place), a):  # type: ignore[arg-type]
            key = "dtype" if "dtype" in carried else "torch_dtype"
            return carried | {key: ours["torch_dtype"]}
    return ours


# Both --------------------------------------------------------------------------------------------------------------


def _start(config: Config, step: str) -> Layout:
    """The processes as a layout."""
    doctor.require()
    if config["device"] == "cuda":
        doctor.require("gpu")
    started = {**config["cluster"], "num_nodes": 1, "procs_per_node": parallel.world_size()}
    if problems := checks.check(step, {**config, "cluster": started}):
        raise UserError(problems[0].message, where=problems[0].key, hint=problems[0].hint)
    layout = parallel.start(
        tensor=config["tensor_model_parallel_size"],
        pipeline=config["pipeline_model_parallel_size"],
        sequence_parallel=False,
        device=config["device"],
        seed=0,
    )
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    on_rank_0(lambda: (Path(config["output_dir"]) / "config.yaml").write_text(text, encoding="utf-8"))
    return layout


def _leave_on_signals() -> None:
    """A conversion that is asked to stop leaves nothing behind, and is to be started again."""

    def leave(_signal: int, _frame: FrameType | None) -> None:
        sys.exit(exit_codes.RESUME_ME)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, leave)


def _by_bridge(what: str, where: str, convert: Callable[[Any], None]) -> int:
    bridge = megatron_bridge.require(what, where)
    parallel.stop()  # it makes process groups of its own
    convert(bridge)
    return exit_codes.FINISHED


def _check_layout(a: Architecture, layout: Layout) -> None:
    """Raise where the parallel sizes do not divide the model."""
    for size, key, what, count in (
        (layout.tensor, "tensor_model_parallel_size", "key/value heads", a.num_key_value_heads),
        (layout.tensor, "tensor_model_parallel_size", "rows of the MLP", a.intermediate_size),
        (layout.pipeline, "pipeline_model_parallel_size", "layers", a.num_layers),
    ):
        if count % size:
            message = f"{size} does not divide the model's {count} {what}"
            on_rank_0(lambda message=message, key=key: _refuse(message, key))  # type: ignore[misc]


def _refuse(message: str, key: str) -> None:
    raise UserError(message, where=key, hint="a checkpoint can be read at any size, whichever wrote it: 1 always works")


def _origin(config: Config, source: Path, fingerprint: str) -> dict[str, Any]:
    return {
        "source": str(source),
        "fingerprint": fingerprint,
        "precision": config["precision"],
        "version": __version__,
    }


def _made_before(there: Path | None, target: Path, origin: Mapping[str, Any], key: str | None) -> bool:
    """Whether the output is there already, made of the same; UserError where it is something else.

    there: the output, where there is one. key: of training_info.json, which holds its record; None: RECORD does.
    """
    if there is None:
        return False
    record = (read_info(there) or {}).get(key) if key else read_json(there / RECORD)
    same = ("fingerprint", "precision")
    if record and all(record.get(name) == origin[name] for name in same):
        log.info("finished already: %s was made of the same weights", there)
        return True
    raise UserError(
        f"{there} is there already" + (f", made of {record['source']}" if record else ""),
        where="megatron_path" if key else "hf_path",
        hint="name another folder or output_dir, or remove it",
    )


def _compare(config: Config, weights: Path, folder: Path, a: Architecture, layout: Layout, ids: Any) -> dict[str, Any]:
    """What the record says of both sides' logits; UserError where they are too far apart."""
    wanted = config["compare_logits"]
    if wanted == "never" or (wanted == "auto" and not logit_check.fits(a, layout)):
        if wanted == "auto":
            log.warning("logits are not compared: the model in float32 would not fit into memory (compare_logits=auto)")
        return {"max_logit_difference": None}
    sides = logit_check.Sides(weights, folder, a, layout, rounded=DTYPES[config["precision"]])
    found = logit_check.agree(sides, ids, limit=config["max_logit_difference"])
    return {"max_logit_difference": found.difference, "computed_in": found.dtype, "compared_tokens": found.tokens}


def _say(what: str, a: Architecture, dtypes: Any) -> None:
    """What is converted: how much of which kind."""
    count = sum(torch.Size(hf.hf_shape(name, a)).numel() for name in hf.hf_names(a))
    kinds = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))
    log.info("%s: %s, %d layers, %.3g million parameters in %s", what, a.family, a.num_layers, count / 1e6, kinds)
