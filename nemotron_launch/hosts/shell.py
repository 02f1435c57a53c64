"""The clean shell in which commands run, here and on other machines: what its environment has, how a script gets there.

Another machine gets one command for a whole connection: a loop that reads scripts from its standard input and answers
each with its output, a mark and its exit code. One login, one channel and one round trip a script, however many.
"""

from __future__ import annotations

import base64
import shlex
from collections.abc import Mapping

# What a command may see of the environment around it. sbatch hands all of it on to the job, so neither SBATCH_* and
# SRUN_*, which beat the script's directives, nor tokens are here.
KEPT = (
    "HOME", "PATH", "USER", "LOGNAME", "SHELL", "TZ", "TMPDIR", "LANG", "LANGUAGE", "LC_ALL", "LC_COLLATE", "LC_CTYPE",
    "LC_MESSAGES", "LC_MONETARY", "LC_NUMERIC", "LC_TIME", "LD_LIBRARY_PATH", "SLURM_CONF", "KRB5CCNAME", "KRB5_CONFIG",
)  # fmt: skip
TERMINAL = ("TERM", "COLORTERM")


def clean(environ: Mapping[str, str], *, terminal: bool = False) -> dict[str, str]:
    """The part of an environment that commands see."""
    names = (*KEPT, *TERMINAL) if terminal else KEPT
    return {name: environ[name] for name in names if name in environ}


def loop(mark: str, *, login: bool) -> str:
    """The program that answers scripts until its input ends.

    A request is a line `<bytes of script> <bytes of input>`, then the script, which ends in the mark, then its input.
    The answer: what the script wrote, the mark twice and its exit code on standard output, the mark twice on standard
    error; once it stands in what `ps` and `set` show. A script whose end has not come, as the connection was cut,
    does not run.
    """
    program = f"""\
ended() {{ printf '%s%s %s\\n' {mark} {mark} "$1"; printf %s%s {mark} {mark} >&2; }}
ended 0
while read -r script input; do
    script=$(head -c "$script")
    case $script in *{mark}) ;; *) exit ;; esac
    if [ "$input" = 0 ]; then
        (eval "$script") </dev/null
    else
        head -c "$input" | {{ (eval "$script"); code=$?; cat >/dev/null; exit $code; }}
    fi
    ended $?
done"""
    return _clean_shell(program, KEPT, login)


def remote_command(program: str) -> str:
    """A command that takes its program, of a known length, from standard input; in the words of any shell, csh too."""
    return f"exec /bin/sh -c 'exec /bin/sh -c \"$(head -c {len(program.encode())})\"'"


def terminal_command(script: str, *, login: bool) -> str:
    """A command that runs a script in a clean environment and leaves standard input to it."""
    program = _clean_shell(script, (*KEPT, *TERMINAL), login)
    text = base64.b64encode(program.encode(errors="surrogateescape")).decode()
    return f"exec /bin/sh -c 'eval \"$(printf %s {text} | base64 -d)\"'"


def _clean_shell(program: str, names: tuple[str, ...], login: bool) -> str:
    kept = " ".join(f'${{{name}+"{name}=${name}"}}' for name in names)
    shell = f"exec env -i {kept} /bin/sh -c {shlex.quote(program)}"
    if not login:
        return shell
    # What the profile scripts read is not ours, and what they export goes the same way as what was there before.
    return f"exec 3<&0 </dev/null\nexec env -i {kept} bash -l -c {shlex.quote('exec <&3 3<&-' + chr(10) + shell)}"
