"""Container images on a cluster: imported as squash files by batch jobs, listed, asked about, removed.

What runs there are lines of POSIX shell for a Host, and the batch script `import_image.sbatch`, which a run brings
along and `nemotron images squash` submits by itself.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from nemotron_launch.backends import slurm_scripts
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen
from nemotron_launch.hosts import Result
from nemotron_launch.quoting import sh, sh_words

NOTE = "image_jobs"  # in a run's folder: the imports that it waits for, a line each: job, and that job's log

# A squash file that is whole is as long as its superblock says.
_WHOLE = """\
whole() {
    [ "$(head -c 4 "$1" 2> /dev/null)" = hsqs ] &&
        [ "$(stat -L -c %s "$1")" -ge "$(od -An -t u8 -j 40 -N 8 "$1" | tr -d ' ')" ]
}
digest() { timeout 20 enroot digest "$1" 2> /dev/null | grep -oE 'sha256:[0-9a-f]{64}' | head -n 1; }
"""


@frozen
class Ensured:
    """job_ids: of the imports that must end well first; none where all images are there. notes: for the user."""

    job_ids: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@frozen
class Stored:
    """An image in the folder. size in bytes; imported: when, UTC; used: when a run last began with it, seconds since
    1970. digest: what the tag meant then; now: what it means today, empty where nobody asked or nobody can say."""

    name: str
    size: int
    whole: bool
    used: float
    uri: str = ""
    digest: str = ""
    sha256: str = ""
    imported: str = ""
    now: str = ""

    @property
    def moved(self) -> bool:
        return bool(self.digest and self.now and self.digest != self.now)


def ensure(run_dir: str, *, force: bool = False) -> str:
    """See that the images of a run's folder are there, or that jobs are about to make them: the run's own, unless
    another run's import of the same image waits or works already. `ensured` reads the answer."""
    forced = "NEMOTRON_FORCE_SQUASH=1 " if force else ""
    return f"""\
{slurm_scripts.PLAIN}
{_WHOLE}
cd {sh(run_dir)} || exit 1
rm -f {NOTE}
for script in import_*.sbatch; do
    [ -f "$script" ] || continue
    eval "$(grep -E '^(uri|squash)=' "$script")"
    name=$(sed -n 's/^#SBATCH --job-name=//p' "$script") is=
    if {"false" if force else 'whole "$squash"'}; then
        echo "there $squash"
        was=$(sed -n 's/.*"digest": "\\([^"]*\\)".*/\\1/p' "$squash.json" 2> /dev/null)
        [ -z "$was" ] || ! command -v enroot > /dev/null || is=$(digest "$uri")
        [ -z "$is" ] || [ "$is" = "$was" ] || echo "moved $uri"
        continue
    fi
    command -v sbatch > /dev/null 2>&1 || exit {slurm_scripts.NO_SLURM}
    id={"" if force else '$(squeue --noheader --user="$(id -un)" --name="$name" --format=%i | tail -n 1)'}
    [ -n "$id" ] || id=$({slurm_scripts.CLEAN} {forced}sbatch --parsable "$script") || exit 1
    id=${{id%%;*}}
    log=$(scontrol --oneliner show job "$id" 2> /dev/null | sed -n 's/.* StdOut=\\([^ ]*\\).*/\\1/p')
    echo "$id ${{log:-{sh(posixpath.join(run_dir, "import-"))}$id.out}}" >> {NOTE}
    echo "job $id $uri"
done
"""


def ensured(done: Result) -> Ensured:
    """What `ensure` printed. UserError: an import could not be submitted, with Slurm's reason."""
    if done.code:
        said = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit code {done.code}")
        said = re.sub(r"^sbatch: (error: )?(Batch job submission failed: )?", "", said.strip())
        key = next((key for key in ("partition", "time") if re.search(rf"\b{key}\b", said)), None)
        hint = "the profile's build_partition and build_time are for this job" if key else None
        message = f"Slurm refuses the import of the image: {said}"
        raise UserError(message, where=f"build_{key}" if key else None, hint=hint, exit_code=1)
    jobs, notes = [], []
    for line in done.stdout.splitlines():
        key, _, value = line.partition(" ")
        if key == "moved":
            notes.append(f"{value} has moved since it was imported: --force-squash imports it anew")
        elif key == "job":
            job_id, _, uri = value.partition(" ")
            jobs.append(job_id)
            notes.append(f"{uri} is imported first, by job {job_id}")
    return Ensured(tuple(jobs), tuple(notes))


def failure(log: str) -> str:
    """Why an import ended badly, as its log says; empty where it does not."""
    found = re.findall(r"^error: (.*(?:\n {7}.*)*)", log, re.MULTILINE)
    return re.sub(r"\n {7}", " ", found[-1]) if found else ""


# The folder ---------------------------------------------------------------------------------------------------------


def look(image_dir: str, *, ask: bool = False) -> str:
    """List the folder, for `stored`. ask: also what each tag means today, where the host has an enroot that can say."""
    asked = '[ -z "$u" ] || ! command -v enroot > /dev/null || d=$(digest "$u")' if ask else ":"
    return f"""\
{_WHOLE}
cd {sh(image_dir)} 2> /dev/null || exit 0
for f in *.sqsh; do
    [ -f "$f" ] || continue
    w=0 d= u=$(sed -n 's/.*"uri": "\\([^"]*\\)".*/\\1/p' "$f.json" 2> /dev/null)
    whole "$f" && w=1
    {asked}
    set -- "$f"
    [ ! -f "$f.json" ] || set -- "$f" "$f.json"
    printf 'image %s %s %s %s %s\\n' "$(stat -L -c %s "$f")" "$w" "$(stat -L -c %Y "$@" | sort -n | tail -n 1)" \\
        "${{d:--}}" "$f"
    printf 'noted %s\\n' "$(head -n 1 "$f.json" 2> /dev/null)"
done
"""


def stored(text: str) -> list[Stored]:
    """What `look` printed."""
    found: list[Stored] = []
    lines = text.splitlines()
    for n, line in enumerate(lines):
        if not line.startswith("image "):
            continue
        _, size, whole, used, now, name = line.split(" ", 5)
        noted: dict[str, Any] = {}
        with suppress(ValueError):  # an older import, or one by hand
            noted = json.loads(lines[n + 1].partition(" ")[2])
        known = {key: str(noted.get(key, "")) for key in ("uri", "digest", "sha256", "imported")}
        found.append(Stored(name, int(size), whole == "1", float(used), now=now.strip("-"), **known))
    return found


def leftovers(image_dir: str) -> str:
    """Print what dead imports left behind: work folders that nobody has touched for a day, and their locks."""
    return f"""\
cd {sh(image_dir)} 2> /dev/null || exit 0
find . -maxdepth 1 -name '.import-????????' -type d -mmin +1440 2> /dev/null | sed 's,^\\./,,'
"""


def remove(image_dir: str, names: Iterable[str], work: Sequence[str] = ()) -> str:
    """Remove images by name, with what is noted of them, and leftovers."""
    files = [part for name in names for part in (name, f"{name}.json")]
    gone = [f"rm -f -- {sh_words(files)}"] if files else []
    gone += [f"rm -rf -- {sh_words(work)}"] if work else []
    return "\n".join([f"cd {sh(image_dir)} || exit 1", *gone]) + "\n"
