"""A job as files for Slurm: the sbatch script, the wrapper that runs on every node, the import of its image.

Everything clever is computed here, so that the templates read as the script that they produce.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemotron_launch import images, quoting
from nemotron_launch.backends.slurm_options import check_line_ends, sbatch_options, srun_args, word
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen
from nemotron_launch.job import File, Job, Mount, Service
from nemotron_launch.quoting import sbatch, sh
from nemotron_launch.render import Rendered, fill, fill_own
from nemotron_launch.trainer.exit_codes import CLAIMED

MAIN = "job.sbatch"
IMPORT = "import_image.sbatch"
SECRETS = "secrets.env"
SHELL = "shell.sh"
SPAWN = "nemotron_launch.trainer.spawn"


@frozen
class _Step:
    """An srun step, as the template prints it: options one a line, words quoted."""

    name: str
    options: tuple[str, ...]
    launcher: str  # what the runtime wants before the command, "ch-run … --"; empty for pyxis and none
    command: str


def render_job(job: Job) -> Rendered:
    """The files of a job on Slurm. UserError: a value that the script, Slurm or the container runtime cannot carry."""
    _check(job)
    found = _images(job)
    values = _values(job, found)
    text = fill_own(Path(job.template), values) if job.template else fill("slurm/job.sbatch.j2", values)
    if job.template:
        check_line_ends(text, job.template)
    files = [File(MAIN, text), File("node.sh", fill("slurm/node.sh.j2", _node_values(job, None)))]
    files.append(File(SHELL, fill("slurm/shell.sh.j2", values)))
    files += [
        File(f"service-{service.name}.sh", fill("slurm/node.sh.j2", _node_values(job, service)))
        for service in job.services
    ]
    if job.setup:
        files.append(File("setup.sh", _setup(job)))
    for name, image in found.items():
        if image.uri:
            script = import_script(image, job.options, posixpath.dirname(job.run_dir), job.run_dir)
            files.append(File(f"import_{name}.sbatch", script))
    return Rendered(MAIN, (*files, *job.files))


def import_script(image: images.Image, options: Mapping[str, Any], home: str, log_dir: str) -> str:
    """The batch script that imports an image. options, home: a profile's keys and remote_job_dir; log_dir: for its
    output."""
    return fill("slurm/import_image.sbatch.j2", _import_values(image, options, home, log_dir))


def secrets_text(values: Mapping[str, str]) -> str:
    """The text of `secrets.env` (to be written with mode 0600): `export NAME=value` lines for a shell to source."""
    return "".join(f"export {quoting.name(name)}={sh(value, name)}\n" for name, value in values.items())


def _check(job: Job) -> None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", job.run_id):
        raise UserError(f"{job.run_id!r} is no run id: lower-case letters, digits and - only", where="run id")
    quoting.slurm_path(job.run_dir, "remote_job_dir")
    quoting.path(job.workdir, "remote_job_dir")
    for service in job.services:
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", service.name):
            hint = "lower-case letters, digits, _ and -"
            raise UserError(f"{service.name!r} is no name for a service", where="services", hint=hint)
        if not re.fullmatch(r"[!-~]*", service.health):
            raise UserError(f"{service.health!r} is no path of a URL", where=f"services.{service.name}.health")


def _images(job: Job) -> dict[str, images.Image]:
    """The images of a job by the script's variables for them: `image`, and `image_2` and so on for services of others.

    Each file is there once, however many use it.
    """
    if job.container.runtime == "none":
        return {}
    texts = dict.fromkeys([job.container.image, *(service.image for service in job.services)])
    return {f"image_{n + 1}" if n else "image": images.parse(text) for n, text in enumerate(filter(None, texts))}


def _variable(job: Job, image: str) -> str:
    """The script's word for a service's own image, or for the job's."""
    own = images.parse(image or job.container.image)
    return next(f'"${name}"' for name, one in _images(job).items() if one == own)


def _values(job: Job, found: Mapping[str, images.Image]) -> dict[str, Any]:
    """What the template of the sbatch script sees; strings are shell words unless said otherwise."""
    image = found.get("image")
    return {
        "job": job,
        "directives": sbatch_options(job),
        "about": _about(job),
        "run_dir": word(job.run_dir),
        "workdir": word(job.workdir),
        "claimed": CLAIMED,
        "resume_code": job.restart.resume_code,
        "max_restarts": job.restart.max_restarts,
        "requeue": job.options.get("requeue", True),
        "name": job.run_id,
        "comment": word(f"{job.options['comment']} ", "comment") if job.options.get("comment") else "",
        "checkpoints": _checkpoints(job),
        "bundle": word(job.bundle.file, "bundle") if job.bundle else "",
        "bundle_sha256": job.bundle.sha256 if job.bundle else "",
        "secrets": bool(job.secrets),
        "seen_from": job.nodes + sum(service.nodes for service in job.services),
        "interface": word(job.options["interface"], "interface") if job.options.get("interface") else "",
        "hang_timeout": int(job.options.get("hang_timeout") or 0),
        "points": len(job.points),
        "metrics": _metrics(job),
        "image_uri": word(image.uri, "image") if image and image.uri else "",
        "image_path": _image_path(job, image) if image else "",
        "images": [
            {"name": name, "path": _image_path(job, one), "uri": word(one.uri, "image") if one.uri else ""}
            for name, one in found.items()
        ],
        "services": [_service(job, n) for n in range(len(job.services))],
        "trainer": _Step(
            "node",
            (*_step_options(job, 0, job.nodes), *_container_options(job, ""), *srun_args(job)),
            _launcher(job, ""),
            _command(job),
        ),
        "shell": _Step(
            "shell",
            ("--nodes=1", "--ntasks=1", "--mpi=none", f"--chdir={word(job.workdir)}", *_container_options(job, "")),
            _launcher(job, ""),
            "bash",
        ),
    }


def _metrics(job: Job) -> str:
    """The file that grows with every step, as a word of the script."""
    if job.points:
        return '"$output_dir"/metrics.jsonl'
    return word(posixpath.join(job.workdir, job.output_dir, "metrics.jsonl"), "output_dir")


def _checkpoints(job: Job) -> str:
    """The folder of the step_N checkpoints, as a word of the script; empty where the job makes none."""
    texts = [point.config for point in job.points] or [file.text for file in job.files if file.path == "config.yaml"]
    found = re.search(r"^ +checkpoint_dir: (.+)$", texts[0], re.MULTILINE) if texts else None
    if not found:
        return ""
    folder = found.group(1)
    if folder.startswith(("'", '"')):
        import yaml  # slow to import, and seldom needed

        folder = yaml.safe_load(folder)
    if not job.points:
        return word(posixpath.join(job.workdir, folder), "checkpointing.checkpoint_dir")
    inside = posixpath.relpath(posixpath.join(job.workdir, folder), job.points[0].output_dir)
    return "" if inside.startswith("..") else f'"$output_dir"/{word(inside)}'


def _command(job: Job) -> str:
    """The trainer's command. In that of an array, the first point's config and output folder become each point's."""
    own = {}
    if job.points:
        own = {posixpath.join(job.run_dir, "point-0", "config.yaml"): '"$state_dir"/config.yaml'}
        own[job.output_dir] = '"$output_dir"'
    return _words(job.command, "command", own)


def _about(job: Job) -> str:
    """One line for a comment: what this is. Names of steps, configs and profiles may hold anything."""
    text = f"{job.step} -c {job.config}, profile {job.profile}"
    return re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]", "?", text)


def _step_options(job: Job, first: int, nodes: int) -> list[str]:
    """Where a step runs. `--cpus-per-task` is repeated since srun stopped inheriting it from sbatch (22.05)."""
    options = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    if job.services:
        options += [f"--relative={first}", "--overlap"]
    if job.options.get("cpus_per_task"):
        options.append(f"--cpus-per-task={int(job.options['cpus_per_task'])}")
    mpi = word(job.options.get("mpi") or "none", "mpi")
    return [*options, f"--mpi={mpi}", "--export=ALL", "--kill-on-bad-exit=1"]


def _container_options(job: Job, image: str) -> list[str]:
    """Pyxis' options of srun. image: a service's own; empty for the job's."""
    if job.container.runtime != "pyxis":
        return []
    mounts = ",".join(_pyxis_mount(n, mount) for n, mount in enumerate(_mounts(job)))
    return [
        f"--container-image={_variable(job, image)}",
        f"--container-mounts={word(mounts)}",
        f"--container-workdir={word(job.workdir)}",
        "--no-container-mount-home",
    ]


def _pyxis_mount(n: int, mount: Mount) -> str:
    source, target = quoting.mount(mount.source, f"mounts[{n}]"), quoting.mount(mount.target, f"mounts[{n}]")
    return f"{source}:{target}" + (":ro" if mount.read_only else "")


def _launcher(job: Job, image: str) -> str:
    """The program that enters the container: Charliecloud's ch-run; nothing for pyxis, which is part of srun."""
    if job.container.runtime != "charliecloud":
        return ""
    binds = []
    for n, mount in enumerate(_mounts(job)):
        source, target = quoting.mount(mount.source, f"mounts[{n}]"), quoting.mount(mount.target, f"mounts[{n}]")
        if mount.read_only:
            hint = "charliecloud binds folders as they are; leave :ro away"
            raise UserError(f"{source} cannot be read-only", where=f"mounts[{n}]", hint=hint)
        binds.append(f"--bind={word(f'{source}:{target}')}")
    return " ".join(["ch-run", *binds, f"--cd={word(job.workdir)}", _variable(job, image), "--"])


def _mounts(job: Job) -> list[Mount]:
    """The container's mounts, and the folder of all runs unless one of them shows it at its own path."""
    home = posixpath.dirname(job.run_dir.rstrip("/"))
    covering = [m for m in job.container.mounts if (home + "/").startswith(m.target.rstrip("/") + "/")]
    deepest = max(covering, key=lambda m: len(m.target.rstrip("/")), default=None)
    if deepest and deepest.source.rstrip("/") == deepest.target.rstrip("/") and not deepest.read_only:
        return list(job.container.mounts)
    quoting.mount(home, "remote_job_dir")
    return [*job.container.mounts, Mount(home, home)]


def _image_path(job: Job, image: images.Image) -> str:
    """The image as a file: as given, or where its import puts it."""
    if job.container.runtime == "charliecloud" and not image.path:
        raise UserError(
            f"charliecloud runs a squash file or an unpacked folder, not {image.uri.removeprefix('docker://')}",
            where="image",
            hint="make one:  ch-image pull …  and  ch-convert … /lustre/images/NAME.sqsh",
        )
    image_dir = images.folder(job.options, posixpath.dirname(job.run_dir))
    return word(image.path or posixpath.join(image_dir, image.squash_name), "image")


def _service(job: Job, n: int) -> dict[str, Any]:
    service = job.services[n]
    first = job.nodes + sum(other.nodes for other in job.services[:n]) if service.nodes else 0
    return {
        "name": service.name,
        "variable": "NEMOTRON_SERVICE_" + re.sub(r"[^A-Z0-9]", "_", service.name.upper()),
        "first": first,
        "port": int(service.port),
        "health": word(service.health),
        "start_timeout": int(service.start_timeout),
        "step": _Step(
            service.name,
            (*_step_options(job, first, service.nodes or 1), *_container_options(job, service.image)),
            _launcher(job, service.image),
            _words(service.command, f"services.{service.name}.command"),
        ),
    }


def _gpu_slice(job: Job, service: Service | None) -> tuple[int, int] | None:
    """First GPU and number of GPUs of a program that shares its node with others; None where it has all of them."""
    if not any(other.gpus and not other.nodes for other in job.services):
        return None
    if service is None:
        return 0, job.procs
    if service.nodes:
        return None
    before = job.services[: job.services.index(service)]
    return job.procs + sum(other.gpus for other in before if not other.nodes), service.gpus


def _node_values(job: Job, service: Service | None) -> dict[str, Any]:
    """What the wrapper's template sees: of the trainer, or of a service."""
    env = {**job.env, **(service.env if service else {})}
    key = f"services.{service.name}.env" if service else "env"
    trains = service is None and SPAWN in job.command
    remote = posixpath.dirname(job.run_dir.rstrip("/"))
    return {
        "about": f"service {service.name} of {_about(job)}" if service else _about(job),
        "run_dir": sh(job.run_dir),
        "workdir": sh(job.workdir),
        "hf_home": sh(posixpath.join(remote, "hf")),
        "env": [(quoting.name(name, key), sh(value, f"{key}.{name}")) for name, value in env.items()],
        "secrets": [quoting.name(secret.name, "secrets") for secret in job.secrets],
        "bundle": job.bundle is not None and service is None,
        "setup": bool(job.setup),
        "doctor": sh(job.container.python, "python") if trains else "",
        "resume_code": job.restart.resume_code,
        "gpus": _gpu_slice(job, service),
        "is_service": service is not None,
        "charliecloud": job.container.runtime == "charliecloud",
    }


def _setup(job: Job) -> str:
    for n, line in enumerate(job.setup):
        quoting.sh(line, f"setup[{n}]")  # only for what no file can carry
    return "# The profile's setup commands.\n" + "".join(f"{line}\n" for line in job.setup)


def _import_values(image: images.Image, options: Mapping[str, Any], home: str, log_dir: str) -> dict[str, Any]:
    image_dir = images.folder(options, home)
    directives = [f"--job-name={sbatch('nemotron-image-' + image.squash_name, 'image')}", "--dependency=singleton"]
    for option, keys in {
        "account": ("account",),
        "partition": ("build_partition", "partition"),
        "qos": ("qos",),
        "reservation": ("reservation",),
    }.items():
        if value := next((options[key] for key in keys if options.get(key)), None):
            directives.append(f"--{option}={sbatch(value, keys[0])}")
    directives += ["--nodes=1", "--ntasks=1"]
    gpus, directive = int(options.get("build_gpus_per_node") or 0), options.get("gpu_directive", "gpus-per-node")
    if gpus and directive != "none":
        directives.append(f"--{directive}={f'gpu:{gpus}' if directive == 'gres' else gpus}")
    directives += [
        f"--time={sbatch(options.get('build_time') or '01:00:00', 'build_time')}",
        f"--output={sbatch(posixpath.join(quoting.slurm_path(log_dir, 'remote_job_dir'), 'import-%j.out'))}",
    ]
    registry = image.uri.partition("://")[2].partition("#")[0] if "#" in image.uri else "docker.io"
    return {
        "uri": word(image.uri, "image"),
        "uri_json": word(quoting.json(image.uri, "image")),
        "image_dir": word(image_dir),
        "squash": word(posixpath.join(image_dir, image.squash_name)),
        "registry": registry.rpartition("@")[2],
        "directives": directives,
    }


def _words(values: Iterable[object], key: str, own: Mapping[str, str] | None = None) -> str:
    """A command, with a new line of the script before each of its options. own: words that are quoted already."""
    words = [(own or {}).get(str(value)) or word(value, f"{key}[{n}]") for n, value in enumerate(values)]
    return " ".join(f"\\\n    {word}" if n and word.startswith("--") else word for n, word in enumerate(words))
