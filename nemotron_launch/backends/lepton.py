"""Renders a job as DGX Cloud Lepton wants it: a job spec, and the command that each of its replicas runs.

The spec is plain data, dumped as JSON with sorted keys; the command is text from a template. Lepton has no time limit,
no working directory and no processes per node, so the command does those. Nothing here talks to the service.
"""

from __future__ import annotations

import json
import posixpath
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from nemotron_launch import bundle as bundles
from nemotron_launch import quoting
from nemotron_launch.backends import services
from nemotron_launch.config.schema import load_schema
from nemotron_launch.config.validation import check
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen
from nemotron_launch.job import Bundle, File, Job, Mount, Secret
from nemotron_launch.profiles import seconds
from nemotron_launch.render import Rendered, fill, fill_own, setup_file

SCHEMA = Path(__file__).with_name("lepton_job.schema.json")
LONGEST_NAME = 36
MASTER_PORT = 29400
BEACON_PORT = 29401
_RESERVED = {MASTER_PORT: "the trainer's rendezvous", BEACON_PORT: "what tells that the trainer is there"}
# Linux gives a program no string of 128 KiB (MAX_ARG_STRLEN, its NUL included) and 2 MiB in all: arguments and
# variables, each with its NUL and a pointer. The image and Lepton add variables of their own: 256 KiB are left to them.
LONGEST_STRING = 131071
LARGEST_ENVIRONMENT = (2 << 20) - (256 << 10)
PART = 96 << 10  # characters of base64 in one variable
_TIME = "04:00:00"
_SAVE_AHEAD = 300  # seconds
_BEACON_PERIOD = 10  # seconds
_KILL_AFTER = 30  # seconds, what Kubernetes gives too
_TTL = 86400  # seconds
_START_TIMEOUT = 1800  # seconds
_SPAWN = "nemotron_launch.trainer.spawn"
_OURS = ("LEPTON_", "NEMOTRON_BUNDLE_", "NEMOTRON_FILE_", "NEMOTRON_SERVICE_")
# What the command sets, and what bash changes, refuses to change, or runs when it starts.
_TAKEN = """
    MASTER_ADDR MASTER_PORT NNODES NODE_RANK
    run_dir workdir node attempt copy trainer services given scratch fresh beacon missed save_at stop_at told
    PWD OLDPWD SHLVL SECONDS RANDOM SRANDOM LINENO UID EUID PPID GROUPS ENV SHELLOPTS DIRSTACK FUNCNAME PIPESTATUS
    EPOCHSECONDS EPOCHREALTIME COMP_WORDBREAKS HISTCMD POSIXLY_CORRECT IFS PS4 OPTIND OPTARG OPTERR
    HOSTNAME HOSTTYPE MACHTYPE OSTYPE _
"""
_PRIORITY = re.compile(r"(?:(low|mid|high)-)?([1-9])(?:000)?")
_REWRITTEN = re.compile(r"\$(?=[$(])")


@frozen
class Inline:
    """A file that the spec carries: base64 in the variables `<variable>_0` to `<variable>_<parts - 1>`.

    path and mode are words of the command.
    """

    path: str
    mode: str
    sha256: str
    variable: str
    parts: int
    envs: tuple[tuple[str, str], ...]


def render_job(job: Job) -> Rendered:
    """The job spec `job.json`, and beside it the command and the files that the spec carries inside.

    UserError: what Lepton cannot carry, with what to do.
    """
    files = [*([setup_file(job)] if job.setup else []), *job.files]
    inline = [_inline(file, f"NEMOTRON_FILE_{n}") for n, file in enumerate(files)]
    bundle = _bundle(job.bundle)
    exports, envs = _environment(job)
    carried = [pair for file in inline for pair in file.envs]

    def build(bundle: Sequence[tuple[str, str]]) -> tuple[str, dict[str, Any]]:
        text = _command(job, inline, len(bundle), exports)
        inside = [{"name": name, "value": value} for name, value in (*carried, *bundle)]
        return text, _spec(job, text, [*envs, *inside])

    text, spec = build(bundle)
    if environment_size(spec) > LARGEST_ENVIRONMENT and bundle and covered(job.run_dir, job.container.mounts):
        bundle = ()
        text, spec = build(bundle)
    if (size := environment_size(spec)) > LARGEST_ENVIRONMENT:
        raise _too_large(job, size, sum(len(value) for _, value in bundle))
    _refuse_rewritten(job, text, [env["name"] for env in envs])
    _check(job, spec)
    return Rendered("job.json", (File("job.json", dump(spec)), File("command.sh", text), *files))


def dump(spec: Mapping[str, Any]) -> str:
    """A spec as text: the same data gives the same bytes."""
    return json.dumps(spec, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def short_name(run_id: str) -> str:
    """The job's name at Lepton, always the same for a run: at most 36 of a-z, 0-9 and -, a letter first."""
    if len(run_id) <= LONGEST_NAME and re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", run_id):
        return run_id
    digest = sha256(run_id.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    words = re.sub(r"[^a-z0-9]+", "-", run_id.lower())
    head = re.sub(r"^[^a-z]+", "", words)[: LONGEST_NAME - len(digest) - 1].strip("-")
    return f"{head or 'run'}-{digest}"


def nonce(job: Job) -> str:
    """What marks this run's last log line: known to who has the job, met nowhere else by chance."""
    parts = [job.run_id, job.bundle.sha256 if job.bundle else "", *(file.text for file in job.files)]
    return sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def read_exit(line: str, nonce: str) -> tuple[int, int, int] | None:
    """(attempt, node, exit code) where a log line is a replica's last of the run with this nonce, else None."""
    found = re.fullmatch(rf"nemotron-exit {re.escape(nonce)} attempt=(\d+) node=(\d+) code=(\d+)", line.strip())
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


def node_groups(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """The node groups of a spec, names or ids, as the profile gives them."""
    return tuple(spec["spec"].get("affinity", {}).get("allowed_dedicated_node_groups", ()))


def with_node_group_ids(spec: Mapping[str, Any], ids: Mapping[str, str]) -> dict[str, Any]:
    """The spec as Lepton takes it: each node group that `ids` has as a name replaced by its id, others left as ids."""
    if not node_groups(spec):
        return dict(spec)
    affinity = {"allowed_dedicated_node_groups": [ids.get(group, group) for group in node_groups(spec)]}
    return {**spec, "spec": {**spec["spec"], "affinity": affinity}}


def covered(path: str, mounts: Iterable[Mount]) -> bool:
    """Whether a path lies in a mount that can be written."""
    path = posixpath.normpath(path)
    targets = (posixpath.normpath(mount.target).rstrip("/") + "/" for mount in mounts if not mount.read_only)
    return any(f"{path}/".startswith(target) for target in targets)


def environment_size(spec: Mapping[str, Any]) -> int:
    """Bytes that the command and the variables of a spec take of what Linux gives a program, a NUL and pointer each."""
    envs = spec["spec"]["envs"]
    variables = [f"{env['name']}={env.get('value', '')}" for env in envs]
    return sum(len(text.encode()) + 1 + 8 for text in [*spec["spec"]["container"]["command"], *variables])


# The spec ----------------------------------------------------------------------------------------------------------


def _spec(job: Job, command: str, envs: list[dict[str, Any]]) -> dict[str, Any]:
    options = job.options
    nodes = services.replicas(job)
    spec: dict[str, Any] = {
        "completions": nodes,
        "parallelism": nodes,
        "intra_job_communication": nodes > 1,
        "container": {"image": _image(job), "command": ["/bin/bash", "-c", command, "nemotron"]},
        "envs": envs,
        "mounts": [_mount(job, mount) for mount in job.container.mounts],
        "image_pull_secrets": list(options.get("image_pull_secrets") or ()),
        # A single restarted worker cannot rejoin the others: only the whole job starts again.
        "max_failure_retry": 0,
        "max_job_failure_retry": job.restart.max_restarts,
        "ttl_seconds_after_finished": int(options.get("ttl") or _TTL),
        "log": {"enable_collection": True, "save_termination_logs": True},
    }
    if (shape := options.get("resource_shape")) is not None:
        spec["resource_shape"] = shape
    if (groups := options.get("node_group")) is not None:
        spec["affinity"] = {"allowed_dedicated_node_groups": [groups] if isinstance(groups, str) else list(groups)}
    if size := options.get("shared_memory_mib"):
        spec["shared_memory_size"] = size
    if (reservation := options.get("reservation")) is not None:
        spec["reservation_config"] = {"reservation_id": reservation}
    if queue := _queue(job):
        spec["queue_config"] = queue
    if ("reservation_config" in spec or queue) and "affinity" not in spec:
        key = next(key for key in ("reservation", "priority", "preemption") if options.get(key))
        message = f"{key} is about a node group, and there is none"
        raise UserError(message, where=_where(job, key), hint="set node_group")
    return {"metadata": {"name": short_name(job.run_id)}, "spec": spec}


def _image(job: Job) -> str:
    image = job.container.image.removeprefix("docker://")
    if not image:
        raise UserError("Lepton runs containers, and there is no image", where=_where(job, "image"))
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]*", image) or image.endswith(".sqsh"):
        hint = "name one as a registry does: nvcr.io/nvidia/nemo-rl:v0.6.0"
        raise UserError(f"{image!r} is no image of a registry", where=_where(job, "image"), hint=hint)
    return image


def _mount(job: Job, mount: Mount) -> dict[str, Any]:
    where = _where(job, "mounts")
    if not mount.volume:
        hint = f"write {{path: {mount.source}, mount_path: {mount.target}, from: node-nfs:NAME}}, or from: node-local"
        raise UserError(f"{mount.source}:{mount.target} does not say from which volume", where=where, hint=hint)
    if not re.fullmatch(r"node-local|node-[a-z0-9]+:.+", mount.volume):
        hint = "node-local, or node-<type>:<name> as in node-nfs:lustre"
        raise UserError(f"{mount.volume!r} is no volume of a node group", where=where, hint=hint)
    entry: dict[str, Any] = {
        "from": _text(mount.volume, where),
        "path": quoting.path(mount.source, where),
        "mount_path": quoting.path(mount.target, where),
    }
    if mount.read_only:
        entry["mount_options"] = {"read_only": True}
    return entry


def _queue(job: Job) -> dict[str, Any]:
    queue: dict[str, Any] = {key: True for key, wanted in (job.options.get("preemption") or {}).items() if wanted}
    if priority := job.options.get("priority"):
        queue["priority_class"] = _priority(job, str(priority))
    elif queue:
        queue["priority_class"] = "mid-4000"  # what Lepton's own client sends
    return queue


def _priority(job: Job, given: str) -> str:
    """Lepton's class of a priority: low-1 is low-1000, mid is mid-4000, 9 is high-9000."""
    text = {"low": "low-1", "mid": "mid-4", "high": "high-7"}.get(given.lower(), given.lower())
    found = _PRIORITY.fullmatch(text)
    band = ("low", "mid", "high")[(int(found[2]) - 1) // 3] if found else ""
    if not found or found[1] not in (None, band):
        hint = "low-1 to low-3, mid-4 to mid-6, high-7 to high-9"
        raise UserError(f"{given!r} is no priority class", where=_where(job, "priority"), hint=hint)
    return f"{band}-{found[2]}000"


def _check(job: Job, spec: dict[str, Any]) -> None:
    """Raise what the strict schema says against a spec."""
    for problem in check(load_schema(SCHEMA), spec):
        key = problem.path[1] if len(problem.path) > 1 else ""
        key = {"shared_memory_size": "shared_memory_mib", "ttl_seconds_after_finished": "ttl"}.get(key, key)
        raise UserError(f"Lepton: {problem.message}", where=_where(job, key), hint=problem.hint)


# The environment ---------------------------------------------------------------------------------------------------


def _environment(job: Job) -> tuple[list[tuple[str, str]], list[dict[str, Any]]]:
    """What the command exports itself, quoted, and the spec's envs.

    Kubernetes takes `$$` and `$(NAME)` in an env for its own, so a value with one of them goes into the command.
    """
    exports: list[tuple[str, str]] = []
    envs: list[dict[str, Any]] = [{"name": "NEMOTRON_RUN_ID", "value": job.run_id}]
    for name, value in sorted(job.env.items()):
        _refuse_name(job, name, "env")
        if _REWRITTEN.search(value):
            exports.append((name, word(value, _where(job, f"env.{name}"))))
            continue
        _text(value, _where(job, f"env.{name}"))
        if len(f"{name}={value}".encode()) > LONGEST_STRING:
            hint = "put it into a file on a mount"
            raise UserError(
                f"{len(value.encode())} bytes, more than a program can be given in one variable ({LONGEST_STRING})",
                where=_where(job, f"env.{name}"),
                hint=hint,
            )
        envs.append({"name": name, "value": value})
    envs += [_secret(job, secret) for secret in sorted(job.secrets, key=lambda secret: secret.name)]
    return exports, envs


def _secret(job: Job, secret: Secret) -> dict[str, Any]:
    _refuse_name(job, secret.name, "secrets")
    if secret.name in job.env:
        raise UserError(f"{secret.name} is both a secret and in env", where=_where(job, "secrets"))
    if not secret.reference:
        raise UserError(
            f"{secret.name} is a secret, and on Lepton a secret is a reference to one of the workspace",
            where=_where(job, f"secrets.{secret.name}"),
            hint=f'create it:  lep secret create -n {secret.name} -v "${secret.source or secret.name}"\n'
            f"then say so in the profile:  secrets: {{{secret.name}: {{reference: {secret.name}}}}}",
        )
    _text(secret.reference, _where(job, f"secrets.{secret.name}"))
    return {"name": secret.name, "value_from": {"secret_name_ref": secret.reference}}


def _refuse_name(job: Job, name: str, key: str) -> None:
    quoting.name(name, _where(job, key))
    if name in _TAKEN.split() or name.startswith((*_OURS, "BASH")):
        what = "Lepton sets it" if name.startswith("LEPTON_") else "the job's command or its shell uses it"
        raise UserError(f"{name} cannot be set: {what}", where=_where(job, key), hint="leave it out")


def _inline(file: File, variable: str) -> Inline:
    content = _text(file.text, file.path).encode()
    parts, envs = _parts(variable, content)
    return Inline(word(file.path), f"{file.mode:03o}", sha256(content).hexdigest(), variable, parts, envs)


def _parts(variable: str, content: bytes) -> tuple[int, tuple[tuple[str, str], ...]]:
    text = b64encode(content).decode()
    cut = [text[start : start + PART] for start in range(0, len(text), PART)] or [""]
    return len(cut), tuple((f"{variable}_{n}", part) for n, part in enumerate(cut))


@lru_cache(maxsize=1)  # the points of a sweep share it
def _bundle(made: Bundle | None) -> tuple[tuple[str, str], ...]:
    return _parts("NEMOTRON_BUNDLE", bundles.read(made))[1] if made else ()


def _too_large(job: Job, size: int, inline: int) -> UserError:
    sizes = f"{size / 1024:.0f} KiB, {inline / 1024:.0f} KiB of them its code" if inline else f"{size / 1024:.0f} KiB"
    message = f"a Lepton job carries {LARGEST_ENVIRONMENT / 1024:.0f} KiB, and this one takes {sizes}"
    if not inline:
        hint = "the rest is its config and environment: put large values into files on a mount"
        return UserError(message, where=_where(job, "env"), hint=hint)
    hint = f"""mount a volume at {job.workdir} or above: the code is then read from there
or make run.code smaller: .nemotronignore in its folder names what is not code"""
    return UserError(message, where=_where(job, "remote_job_dir"), hint=hint)


# The command -------------------------------------------------------------------------------------------------------


def _text(value: str, key: str) -> str:
    quoting.sh(value, key)  # only for what no program can be given
    return value


def word(value: object, key: str = "") -> str:
    """One word of the command's shell, any text without NUL, in which Kubernetes finds nothing to rewrite."""
    return _REWRITTEN.sub("$''", quoting.sh(value, key))


def _command(job: Job, inline: Sequence[Inline], bundle_parts: int, exports: Sequence[tuple[str, str]]) -> str:
    """The text of the command. What its template sees is text of a shell, ready to stand where it stands."""
    limit = seconds(job.options.get("time") or _TIME)
    carried = ["NEMOTRON_FILE_"] * any(file.parts for file in inline) + ["NEMOTRON_BUNDLE_"] * bool(bundle_parts)
    python = word(job.container.python, "python")
    values = {
        "job": job,
        "about": re.sub(r"[\x00-\x1f\x7f$\x85\u2028\u2029\ud800-\udfff]", "?", _about(job)),
        "exports": exports,
        "run_dir": word(quoting.path(job.run_dir, "remote_job_dir")),
        "workdir": word(quoting.path(job.workdir, "remote_job_dir")),
        "shared": covered(job.run_dir, job.container.mounts),
        "nonce": nonce(job),
        "resume_code": job.restart.resume_code,
        "replicas": services.replicas(job),
        "serving_nodes": services.replicas(job) - job.nodes,
        "services": services.place(job, word, _RESERVED),
        "beacon_port": BEACON_PORT,
        "beacon_period": _BEACON_PERIOD,
        "master_port": MASTER_PORT,
        "start_timeout": int(job.options.get("start_timeout") or _START_TIMEOUT),
        "inline": inline,
        "bundle": word(job.bundle.file) if job.bundle else "",
        "bundle_sha256": job.bundle.sha256 if job.bundle else "",
        "bundle_parts": bundle_parts,
        "carried": " ".join(f'"${{!{prefix}@}}"' for prefix in carried),
        "python": python,
        "doctor": python if _SPAWN in job.command else "",
        "command": " ".join(word(argument, "command") for argument in job.command),
        "time_limit": limit,
        "save_at": limit - min(_SAVE_AHEAD, limit // 2),
        "kill_after": _KILL_AFTER,
    }
    text = fill_own(Path(job.template), values) if job.template else fill("lepton/command.sh.j2", values)
    size = len(_text(text, "template").encode())
    if size > LONGEST_STRING:
        hint = "pass long values in a file on a mount"
        raise UserError(f"the command has {size} bytes, a program can be given {LONGEST_STRING}", hint=hint)
    return text


def _about(job: Job) -> str:
    return f"{job.step} -c {job.config}, profile {job.profile}, run {job.run_id}"


def _refuse_rewritten(job: Job, text: str, names: Iterable[str]) -> None:
    """Raise where Kubernetes would rewrite the text of a user's template: it takes `$$` and `$(NAME)` for its own."""
    known = "|".join([*map(re.escape, sorted(names)), r"LEPTON_\w+"])
    if found := re.search(rf"\$\$|\$\((?:{known})\)", text):
        line = text.count("\n", 0, found.start()) + 1
        raise UserError(
            f"Kubernetes would rewrite {found[0]} before a shell reads it (line {line} of the command)",
            where=job.template or "command",
            hint="$BASHPID is the shell's process id, $NAME a variable",
        )


def _where(job: Job, key: str) -> str:
    return f"profile {job.profile}: {key}" if key else f"profile {job.profile}"
