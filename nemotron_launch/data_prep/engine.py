"""A blend becomes shards and a manifest: two passes over the data with a decision in between, resumable at any moment.

    blend → files → units ─(workers)→ parts → selection → shards ─(workers)→ published, manifest last

Whatever is done is a whole file in `<output_dir>/.work`; a run that was killed finds it there and goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_launch.artifacts import identity
from nemotron_launch.data_prep import manifest, pool, shards
from nemotron_launch.data_prep.blend import Blend, load_blend
from nemotron_launch.data_prep.lengths import Lengths
from nemotron_launch.data_prep.manifest import DROPPED, FORMAT, QUARANTINE
from nemotron_launch.data_prep.minhash import Near
from nemotron_launch.data_prep.progress import Bar
from nemotron_launch.data_prep.selection import FATES, TRAIN, VALIDATION, Part, Rules, Selection, select
from nemotron_launch.data_prep.shards import Shard, Written
from nemotron_launch.data_prep.sources import Dataset, File, Unit, cut, dataset_files, list_files, need_zstandard
from nemotron_launch.data_prep.units import INDEX, Task, name_of, read_array, write_whole
from nemotron_launch.errors import UserError
from nemotron_launch.resources import display
from nemotron_launch.trainer.file_errors import file_error
from nemotron_launch.trainer.paths import hub_is_offline, resolve_path

log = logging.getLogger(__name__)

WORK = ".work"
_STATE, _PREPARED = "state.json", ".prepared.json"
#: Settings that change how the result is made, but not the result.
_WITHOUT_EFFECT = (
    *("output_dir", "manifest_path", "num_workers", "run", "cluster", "offline", "cache_dir", "blend_path"),
    "max_bad_rows",  # so that a run that was refused goes on when more are allowed
)


@dataclass(frozen=True)
class Preparation:
    """What is prepared, from where to where. config: the composed one; config_sha256: of what decides the result."""

    config: Mapping[str, Any]
    step_dir: Path
    folder: Path
    manifest: Path
    blend: Blend
    files: tuple[File, ...]
    units: tuple[Unit, ...]
    config_sha256: str

    @property
    def work(self) -> Path:
        return self.folder / WORK

    @property
    def where(self) -> str:
        return display(self.blend.path)

    def size_of(self, unit: Unit) -> int:
        """Bytes that the unit has to read, about."""
        return unit.end - unit.begin if unit.end >= 0 else self.files[unit.file].size


def prepare(config: Mapping[str, Any], step_dir: Path) -> Path:
    """Do everything that the config says; the manifest's path. Raises UserError.

    A preparation that is complete and of the same data is left as it is.
    """
    started = time.monotonic()
    pool.give_memory_back()
    made = _open(config, step_dir)
    if _is_complete(made):
        log.info("%s is prepared already, from the same data", made.manifest)
        return made.manifest
    bar = Bar()
    try:
        _begin(made)
        task = _task(made)
        workers = _workers(made)
        hashes = _first_pass(made, task, workers, bar)
        parts = manifest.parts_of(made.work, made.units, made.files)
        reasons = _refuse_bad(made)
        bar.stage("comparing")
        chosen = select(parts, made.blend.sources, made.work, _rules(made), bar.at)
        _refuse_nothing(made, chosen, reasons)
        written = _second_pass(made, task, parts, chosen, workers, bar)
        body = _manifest(made, parts, chosen, hashes, written, reasons)
        manifest.write_dropped(made.work / DROPPED, made.work, parts, chosen)
        _publish(made, written, body)
    except OSError as error:
        raise file_error(error, made.folder) from error
    finally:
        bar.close()
    _say(body, time.monotonic() - started)
    return made.manifest


# Before the first pass ---------------------------------------------------------------------------------------------


def _open(config: Mapping[str, Any], step_dir: Path) -> Preparation:
    if not config["blend_path"]:
        raise UserError("no blend is named", where="blend_path", hint="set blend_path=FILE, a list of sources")
    if config["compression"] == "zstd":
        need_zstandard("compression")
    path = resolve_path(str(config["blend_path"]), step_dir, "blend_path")
    blend = load_blend(path, step_dir)
    files = tuple(list_files(blend, _datasets(blend, config)))
    settings = {name: value for name, value in config.items() if name not in _WITHOUT_EFFECT}
    meaning = [FORMAT, settings, blend.sha256, [source.meaning() for source in blend.sources]]
    digest = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()
    folder = Path(str(config["output_dir"])).expanduser()
    target = Path(str(config["manifest_path"])).expanduser()
    return Preparation(config, step_dir, folder, target, blend, files, tuple(cut(files)), digest)


def _datasets(blend: Blend, config: Mapping[str, Any]) -> dict[tuple[int, int], list[str]]:
    """Files of every saved and hub dataset. Raises one UserError that lists those that cannot be had."""
    places = [
        (number, i, Dataset(entry.kind, entry.name, source.subset, source.split))
        for number, source in enumerate(blend.sources)
        for i, entry in enumerate(source.entries)
        if entry.kind != "file"
    ]
    found = _load([dataset for _, _, dataset in places], config)
    missing = [
        f"{blend.sources[n].where}: {one}" for (n, _, _), one in zip(places, found, strict=True) if type(one) is str
    ]
    if missing:
        raise _missing_on_hub(blend, missing)
    return {(n, i): files for (n, i, _), files in zip(places, found, strict=True) if isinstance(files, list)}


def _load(wanted: Sequence[Dataset], config: Mapping[str, Any]) -> list[list[str] | str]:
    if not wanted:
        return []
    offline = config["offline"] if config["offline"] is not None else hub_is_offline()
    return pool.apart(dataset_files, wanted, config["cache_dir"], offline)


def _missing_on_hub(blend: Blend, missing: Sequence[str]) -> UserError:
    count = "a dataset is" if len(missing) == 1 else f"{len(missing)} datasets are"
    advice = "load them once where there is a network, with the same cache_dir, or give the paths of files"
    return UserError(f"{count} not there", where=display(blend.path), hint="\n".join([*missing, advice]))


def _fingerprint(made: Preparation) -> str:
    states = [[file.path, file.size, file.changed, file.limit] for file in made.files]
    return hashlib.sha256(json.dumps([made.config_sha256, states]).encode()).hexdigest()


def _is_complete(made: Preparation) -> bool:
    """Whether the manifest is there, of this config and these files, and the shards that it names with it."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        body = json.loads(made.manifest.read_bytes())
        state = json.loads((made.folder / _PREPARED).read_bytes())
        listed = [*body["train"], *body["validation"]]
        return state["fingerprint"] == _fingerprint(made) and all(
            (made.manifest.parent / shard["path"]).stat().st_size == shard["bytes"] for shard in listed
        )
    return False


def _begin(made: Preparation) -> None:
    """Make the work folder, or go on in it if it is of the same data and of the same start of the machine.

    What the kernel had not yet written to the disk when a machine stopped is gone, though its file may be there.
    """
    state = {"fingerprint": _fingerprint(made), "boot": _boot()}
    with suppress(OSError, ValueError):
        if json.loads((made.work / _STATE).read_bytes()) == state:
            log.info("going on with what an earlier attempt has done")
            return
    shutil.rmtree(made.work, ignore_errors=True)
    made.work.mkdir(parents=True)
    write_whole(made.work / _STATE, json.dumps(state).encode())


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _workers(made: Preparation) -> int:
    return int(min(made.config["num_workers"] or pool.usable_cores(), max(len(made.units), 1)))


def _task(made: Preparation) -> Task:
    config = made.config
    validated = bool(config["validation_size"]) or any(source.use != "train" for source in made.blend.sources)
    tokenizer = config["tokenizer"] or {}
    if config["max_length"] is not None and not tokenizer.get("name"):
        raise UserError(
            "max_length counts tokens, and no tokenizer is named",
            where="max_length",
            hint="set tokenizer.name to the policy's, or max_length=null",
        )
    rules = _rules(made)
    return Task(
        target=config["target"],
        sources=made.blend.sources,
        files=made.files,
        folder=made.work,
        seed=config["seed"],
        by=rules.by,
        near=rules.near,
        with_whole=rules.exact or rules.near is not None,
        with_asked=validated,
        tokenizer=tokenizer if tokenizer.get("name") else None,
        step_dir=made.step_dir,
        resolve=config["resolve_hf_placeholders"],
        references=made.blend.references,
    )


def _rules(made: Preparation) -> Rules:
    config, dedup = made.config, made.config["dedup"]
    return Rules(
        target=config["target"],
        seed=config["seed"],
        by=dedup["by"],
        exact=dedup["exact"],
        near=Near(threshold=dedup["near_threshold"]) if dedup["near"] else None,
        leakage=config["leakage"] if isinstance(config["leakage"], str) else "off",  # YAML 1.1 reads off as false
        max_length=config["max_length"],
        max_rows=config["max_rows"],
        validation_size=config["validation_size"],
    )


# The passes --------------------------------------------------------------------------------------------------------


def _first_pass(made: Preparation, task: Task, workers: int, bar: Bar) -> list[str]:
    """Make all parts; the sha256 of every file. Public datasets that rows turn out to need are loaded in between."""
    bar.stage("reading", sum(map(made.size_of, _undone(made))))
    datasets: dict[str, list[str]] = {}
    hashes = [""] * len(made.files)
    while True:
        needs: Counter[str] = Counter()
        missing: list[str] = []
        with pool.Pool(workers, task, datasets) as workers_pool:
            for done in workers_pool.units(_undone(made)):
                bar.advance(0 if done.needs else made.size_of(done.unit))
                needs.update(done.needs)
            if not needs:
                for number, digest in workers_pool.hashes([file.path for file in made.files]):
                    hashes[number] = digest
                return hashes
        names = sorted(needs)
        for name, found in zip(names, _load([_named_by(made, name) for name in names], made.config), strict=True):
            if isinstance(found, list):
                datasets[name] = found
            else:
                missing.append(f"{found} (for {needs[name]} rows of {name})")
        if missing:
            raise _missing_on_hub(made.blend, missing)


def _undone(made: Preparation) -> list[Unit]:
    return [unit for unit in made.units if not (made.work / f"{name_of(unit)}.json").exists()]


def _named_by(made: Preparation, name: str) -> Dataset:
    """The public dataset that placeholder rows call so."""
    reference = made.blend.references[name]
    kind = "saved" if Path(reference.path).is_dir() else "hub"
    return Dataset(kind, reference.path, reference.subset, reference.split)


def _refuse_bad(made: Preparation) -> Counter[str]:
    """Write the quarantine; raise where it holds more than max_bad_rows allows."""
    made.folder.mkdir(parents=True, exist_ok=True)
    path = made.folder / QUARANTINE
    reasons = manifest.write_quarantine(path, made.work, made.units, made.files, made.blend)
    read = sum(mark["read"] for _, mark in manifest.marks(made.work, made.units))
    bad, allowed = sum(reasons.values()), made.config["max_bad_rows"]
    if not read:
        raise UserError("the blend's sources hold no rows", where=made.where)
    if bad <= allowed * read:
        return reasons
    ranked = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    lines = [f"{count} × {reason}" for reason, count in ranked[:8]]
    with path.open(encoding="utf-8") as stream:
        lines.append(f"the first one is {json.loads(next(stream))['place']}")
    raise UserError(
        f"{bad} of {read} rows are bad: {100 * bad / read:.3g}% where max_bad_rows allows {100 * allowed:.3g}%",
        where=made.where,
        hint="\n".join([*lines, f"all of them with their reasons are in {path}; nothing is published"]),
    )


def _refuse_nothing(made: Preparation, chosen: Selection, reasons: Counter[str]) -> None:
    if (chosen.fate == TRAIN).any():
        return
    counted = np.bincount(chosen.fate, minlength=len(FATES)).tolist()
    lines = [f"{sum(reasons.values())} × bad row"] if reasons else []
    lines += [f"{count} × {name.replace('_', ' ')}" for name, count in zip(FATES, counted, strict=True) if count]
    raise UserError("no training row is left", where=made.where, hint="\n".join(lines))


def _second_pass(
    made: Preparation, task: Task, parts: Sequence[Part], chosen: Selection, workers: int, bar: Bar
) -> dict[str, list[tuple[Shard, Written]]]:
    counts = shards.mark_entries(parts, made.work, chosen)
    planned = shards.plan(counts, made.config["num_shards_per_split"], zstd=made.config["compression"] == "zstd")
    bar.stage("writing", sum(shard.rows for shard in planned))
    done: dict[int, Written] = {}
    names = [part.name for part in parts if part.rows]
    for i, shard in enumerate(planned):
        with suppress(OSError, ValueError, TypeError):
            done[i] = Written(**json.loads((made.work / f"{shard.name}.json").read_bytes()))
    left = [i for i in range(len(planned)) if i not in done]
    with pool.Pool(min(workers, max(len(left), 1)), task, {}) as workers_pool:
        for place, written in workers_pool.shards([planned[i] for i in left], names, made.work):
            shard = planned[left[place]]
            write_whole(made.work / f"{shard.name}.json", json.dumps(vars(written)).encode())
            done[left[place]] = written
            bar.advance(shard.rows)
    return {
        split: [(shard, done[i]) for i, shard in enumerate(planned) if shard.split == split] for split in shards.SPLITS
    }


# What is left ------------------------------------------------------------------------------------------------------


def _manifest(
    made: Preparation,
    parts: Sequence[Part],
    chosen: Selection,
    hashes: Sequence[str],
    written: Mapping[str, Sequence[tuple[Shard, Written]]],
    reasons: Counter[str],
) -> dict[str, Any]:
    config = made.config
    counts, by_source = manifest.counts_of(made.work, made.units, made.files, parts, chosen, made.blend)
    tokens = identity.of_config(config, made.step_dir)
    return {
        "format": FORMAT,
        "target": config["target"],
        **{split: [{"path": shard.name, **vars(done)} for shard, done in listed] for split, listed in written.items()},
        "counts": counts,
        "sources": manifest.sources_of(made.blend, made.files, hashes, by_source),
        "dedup": dict(config["dedup"]),
        "leakage": {"action": _rules(made).leakage, "exact": chosen.leaks[0], "near": chosen.leaks[1]},
        "tokenizer": tokens.as_data() if tokens else None,
        "lengths": _lengths(made, parts, chosen) if tokens else None,
        "quarantine": {"path": QUARANTINE, "rows": sum(reasons.values()), "reasons": dict(sorted(reasons.items()))},
        "dropped": DROPPED,
        "blend": {"path": str(config["blend_path"]), "sha256": made.blend.sha256},
        "config_sha256": made.config_sha256,
        "seed": config["seed"],
    }


def _lengths(made: Preparation, parts: Sequence[Part], chosen: Selection) -> dict[str, Any]:
    found = {"train": Lengths(), "validation": Lengths(), "read": Lengths()}
    for part in parts:
        tokens = read_array(made.work / f"{part.name}.index", INDEX)["tokens"]
        fate = chosen.fate[part.first : part.first + part.rows]
        found["read"].add(tokens)
        found["train"].add(tokens[fate == TRAIN])
        found["validation"].add(tokens[fate == VALIDATION])
    return {name: lengths.summary(made.config["max_length"]) for name, lengths in found.items()}


def _publish(
    made: Preparation, written: Mapping[str, Sequence[tuple[Shard, Written]]], body: Mapping[str, Any]
) -> None:
    """Move everything to where it belongs, the manifest last; what an earlier preparation left there goes."""
    folder = made.manifest.parent
    folder.mkdir(parents=True, exist_ok=True)
    made.manifest.unlink(missing_ok=True)
    names = [shard.name for listed in written.values() for shard, _ in listed]
    for split in shards.SPLITS:
        for old in folder.glob(f"{split}-[0-9]*-of-[0-9]*.jsonl*"):
            if old.name not in names:
                old.unlink()
    for name in names:
        if (made.work / name).exists():
            shutil.move(made.work / name, folder / name)
    shutil.move(made.work / DROPPED, folder / DROPPED)
    if folder.resolve() != made.folder.resolve():
        shutil.move(made.folder / QUARANTINE, folder / QUARANTINE)
    state = {"fingerprint": _fingerprint(made)}
    write_whole(made.folder / _PREPARED, json.dumps(state).encode())
    write_whole(made.manifest, json.dumps(body, indent=1, ensure_ascii=False).encode() + b"\n")
    shutil.rmtree(made.work, ignore_errors=True)


def _say(body: Mapping[str, Any], seconds: float) -> None:
    counts = body["counts"]
    lost = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts["dropped"].items())
    log.info(
        "%s rows read; %s for training, %s for validation%s; %.1f s",
        f"{counts['read']:,}",
        f"{counts['train']:,}",
        f"{counts['validation']:,}",
        f"; left out: {lost}" if lost else "",
        seconds,
    )
