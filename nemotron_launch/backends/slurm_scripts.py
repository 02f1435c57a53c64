"""The lines of POSIX shell that the Slurm client has a host run; values arrive quoted, lists of folders on stdin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nemotron_launch.backends.slurm_output import SACCT_FORMAT, SQUEUE_FORMAT
from nemotron_launch.quoting import sh, sh_words

BUSY = 75  # exit code: an sbatch for this folder is still under way
NO_SLURM = 127  # exit code of a shell that does not find a command

# Times as seconds since 1970, lists of array tasks in full, and nothing of the user's that changes what is printed.
PLAIN = """\
unset $(env | sed -nE 's/^((SQUEUE|SACCT|SCONTROL|SBATCH|SRUN|SLURM)_[A-Z0-9_]*)=.*/\\1/p' | grep -vx SLURM_CONF)
export SLURM_TIME_FORMAT=%s SLURM_BITSTR_LEN=0
"""

# What sbatch sees of the environment, and with it the job: its whole environment would travel, tokens included, and
# SBATCH_PARTITION would beat the script.
CLEAN = (
    'env -i HOME="$HOME" PATH="$PATH" ${USER:+USER="$USER"} ${LOGNAME:+LOGNAME="$LOGNAME"} ${LANG:+LANG="$LANG"} '
    '${LD_LIBRARY_PATH:+LD_LIBRARY_PATH="$LD_LIBRARY_PATH"} '  # where sbatch comes from a module
    '${SHELL:+SHELL="$SHELL"} ${TZ:+TZ="$TZ"} ${SLURM_CONF:+SLURM_CONF="$SLURM_CONF"}'
)


def submit(
    folder: str, script: str, options: Iterable[str], env: Mapping[str, str], *, before: str = "", record: str = ""
) -> str:
    """Run sbatch once, holding a lock as long as it lives, and keep its answer in the folder.

    folder: where lock and answer are; script: the sbatch script's path. before, record: lines that come before sbatch,
    and those that keep its answer (in the file .submitted) under another name than `submitted`.
    """
    given = " ".join(f"{name}={sh(value)}" for name, value in env.items())
    return f"""\
command -v sbatch > /dev/null 2>&1 || exit {NO_SLURM}
mkdir -p {sh(folder)} && cd {sh(folder)} || exit 1
exec 9>> .submit.lock
flock -n 9 2> /dev/null || {{ command -v flock > /dev/null 2>&1 && exit {BUSY}; }} || :
{before}
{CLEAN} {given} sbatch --parsable {sh_words(options)} {sh(script)} > .submitted
code=$?
if [ "$code" -eq 0 ]; then
    cat .submitted
    {record or "mv -f .submitted submitted"}
fi
exit "$code"
"""


def heir(of: str, point: int | None, restarts: int, why: str) -> tuple[str, str]:
    """Lines for `submit` before and after: the run's folder names its job's successor, first an open one."""
    task = "" if point is None else f"_{point}"

    def put(job: str) -> str:
        return f"echo {sh(of)} {job} {restarts} {sh(why)} > successor.tmp && mv -f successor.tmp successor"

    return (
        put("-"),
        f"""\
next=$(sed -nE 's/^ *([0-9]+)(;.*)?$/\\1/p' .submitted | tail -n 1)
    [ -z "$next" ] || {{ {put(f'"$next"{task}')}; }}""",
    )


def look(folders: Iterable[str], name: str, days: int, *, accounting: bool, clusters: str = "") -> str:
    """Who carries a run: what its folders say (FOLDERS), what the controller knows by its name, and what sacct does.

    Sections begin with `==name`; the last is squeue's exit code.
    """
    where = f"--clusters={sh(clusters)} " if clusters else ""
    sacct = (
        f"""\
sacct {where}--allocations --parsable2 --format={SACCT_FORMAT} --name={sh(name)} --starttime=now-{days}days \\
    --user="$(id -un)" 2> /dev/null
"""
        if accounting
        else ""
    )
    texts = " ".join(sh(folder) for folder in folders)
    return f"""\
{PLAIN}
mark() {{ printf '\\n==%s\\n' "$1"; }}
mark folders
(
    printf '%s\\n' {texts} | {{
{FOLDERS}
    }}
)
mark squeue
{_squeue(where + "--name=" + sh(name))}
code=$?
mark sacct
{sacct}
mark code
echo "$code"
"""


def squeue(jobs: Iterable[str], cluster: str = "") -> str:
    """What the controller knows of these jobs."""
    where = f"--clusters={sh(cluster)} " if cluster else ""
    return f"{PLAIN}\n{_squeue(where + '--jobs=' + sh(','.join(jobs)))}\n"


def squeue_names(names: Iterable[str]) -> str:
    return f"{PLAIN}\n{_squeue('--name=' + sh(','.join(names)))}\n"


def scontrol(jobs: Iterable[str], cluster: str = "") -> str:
    """The same in another form, for a squeue that does not know one of the fields."""
    where = f"--clusters={sh(cluster)} " if cluster else ""
    lines = [f"scontrol {where}--oneliner show job {sh(job)}" for job in jobs]
    return PLAIN + "\n".join(lines) + "\ntrue\n"


def sacct(jobs: Iterable[str], cluster: str = "") -> str:
    """What the accounting knows of jobs that the controller has forgotten."""
    where = f"--clusters={sh(cluster)} " if cluster else ""
    return f"""\
{PLAIN}
command -v sacct > /dev/null 2>&1 || exit {NO_SLURM}
sacct {where}--allocations --parsable2 --format={SACCT_FORMAT} --jobs={sh(",".join(jobs))}
"""


def scancel(jobs: Iterable[str], cluster: str = "") -> str:
    where = f"--clusters={sh(cluster)} " if cluster else ""
    return f"{PLAIN}\nscancel {where}{sh_words(jobs)}\n"


def logs(state_dir: str, run_dir: str, point: int | None) -> str:
    """The paths of a run's logs, the sbatch script's own first."""
    own = f"{sh(run_dir)}/slurm-*{'' if point is None else f'_{point}'}.out"
    return f"""\
for f in {own} {sh(state_dir)}/logs/attempt-*/*.log; do
    [ ! -f "$f" ] || printf '%s\\n' "$f"
done
"""


def _squeue(which: str) -> str:
    """All states, one line for each task of an array, the user's own jobs only (a smaller answer), padding cut off."""
    return f"""\
answer=$(squeue --noheader --array --states=all --user="$(id -un)" --Format={SQUEUE_FORMAT} {which})
code=$?
printf '%s\\n' "$answer" | sed 's/ *$//'
(exit "$code")"""


# What the folders of runs say, for `slurm_output.folders`. stdin: a folder a line.
FOLDERS = """\
first() { [ -f "$2" ] && printf '%s %s\\n' "$1" "$(head -n 1 "$2" 2> /dev/null)"; }
now=$(date +%s)
while IFS= read -r d; do
    printf '@@%s\\n' "$d"
    cd "$d" 2> /dev/null || continue
    echo there
    for f in exit_code reason successor cancelled submitted; do first "$f" "$f"; done
    if [ -f .submit.lock ] && command -v flock > /dev/null 2>&1 && ! flock -n .submit.lock true 2> /dev/null; then
        echo busy
    fi
    first claim: claim
    for f in claim.*; do first "claim:${f#claim.}" "$f"; done
    [ ! -f past ] || printf 'past %s\\n' "$(tr '\\n' ' ' < past)"
    n=0
    for f in logs/attempt-*; do
        [ -d "$f" ] && n=$((n + 1))
    done
    echo "attempts $n"
    last=$(stat -c %Y claim* logs/attempt-*/* slurm-*.out 2> /dev/null | sort -n | tail -n 1)
    [ -z "$last" ] || echo "quiet $((now - last))"
done
"""

# Cancelled: told to the job's own handler too, which might be about to go on. stdin: a folder a line.
CANCELLED = """\
while IFS= read -r d; do
    [ ! -d "$d" ] || [ -e "$d/exit_code" ] || : > "$d/cancelled"
done
"""


def clear(folder: str, job_id: str) -> str:
    """Make room for another submission; the jobs of earlier ones are remembered, so that they are not taken for it."""
    return f"""\
cd {sh(folder)} 2> /dev/null || exit 0
{{
    {f"echo {sh(job_id)}" if job_id else ":"}
    cat submitted 2> /dev/null | cut -d ';' -f 1
    for f in claim claim.*; do [ ! -f "$f" ] || head -n 1 "$f" | cut -d ' ' -f 1; done
    [ ! -f successor ] || head -n 1 successor | cut -d ' ' -f 2 | grep -v '^-' || :
}} >> past
rm -f claim claim.* successor submitted .submitted exit_code reason cancelled
"""
