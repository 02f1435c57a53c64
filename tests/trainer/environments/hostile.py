"""Programs that would do harm, and what may come of them in the sandbox. Run as a script, it tries them all.

A program that ends must say `held`: that what it tried did not work. `problem`: which limit ends it, where one may.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from textwrap import dedent

from nemotron_launch.trainer.environments import jail
from nemotron_launch.trainer.environments.sandbox import Finished, Limits, Program, python, run_programs

#: Seconds are many for those that end by themselves, and few for those that never do.
LIMITS = Limits(seconds=60, memory_mib=256, processes=8, output_kib=256)
BRIEF = replace(LIMITS, seconds=1)
SECRET = "NEMOTRON_HOSTILE_SECRET"


@dataclass(frozen=True)
class Hostile:
    """A program; held: what it prints when it was held; problems: limits, one of which may end it instead."""

    source: str
    held: str = "held"
    problems: tuple[str, ...] = ()
    limits: Limits = LIMITS


ENDLESS = {
    "loops for ever": Hostile("while True: pass", problems=("time",), limits=BRIEF),
    "sleeps for ever": Hostile("import time\nwhile True: time.sleep(1)", problems=("time",), limits=BRIEF),
    "ignores signals": Hostile(
        """
        import signal
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: pass
        """,
        problems=("time",),
        limits=BRIEF,
    ),
    "forks for ever": Hostile(
        """
        import os
        while True:
            try: os.fork()
            except OSError: pass
        """,
        problems=("time", "processes"),
        limits=BRIEF,
    ),
    "starts threads for ever": Hostile(
        """
        import threading, time
        while True:
            try: threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
            except (RuntimeError, MemoryError): pass
        """,
        problems=("time", "processes"),
        limits=BRIEF,
    ),
    "leaves its parent and forks": Hostile(
        """
        import os, time
        while True:
            try:
                if os.fork() == 0:
                    os.setsid()
                    if os.fork(): os._exit(0)
                    time.sleep(60)
            except OSError: pass
        """,
        problems=("time", "processes"),
        limits=BRIEF,
    ),
    "prints gigabytes": Hostile("while True: print('x' * 100000)", problems=("output",)),
    "complains gigabytes": Hostile("import sys\nwhile True: sys.stderr.write('x' * 100000)", problems=("output",)),
    "fills the memory with many": Hostile(
        """
        import os, time
        for _ in range(4):
            if os.fork() == 0: break
        x = bytearray(200 * 2**20)
        time.sleep(60)
        """,
        problems=("memory",),
    ),
}
HELD = {
    "allocates a lot": Hostile(
        """
        try: x = bytearray(10**9)
        except MemoryError: print("held")
        """
    ),
    "fills the disk with a file": Hostile(
        """
        try:
            with open("big", "wb") as file:
                for _ in range(1000): file.write(b"x" * 10**6)
        except OSError: print("held")
        """
    ),
    "fills the disk with files": Hostile(
        """
        try:
            for n in range(10**6): open(f"file{n}", "wb").write(b"x" * 10000)
        except OSError: print("held")
        """
    ),
    "fills the disk with names": Hostile(
        """
        import os
        try:
            for n in range(10**6): os.mkdir(f"folder{n}")
        except OSError: print("held")
        """
    ),
    "reads its own environment": Hostile(f"import os\nprint('held' if {SECRET!r} not in os.environ else os.environ)"),
    "reads others' environment": Hostile(
        """
        import os, glob
        found = [path for path in glob.glob("/proc/*/environ") + ["/proc/1/environ", f"/proc/{os.getppid()}/environ"]
                 if os.path.exists(path)]
        print(found or "held")
        """
    ),
    "looks for others": Hostile(
        """
        import os
        alive = []
        for number in range(2, 5000):
            if number != os.getpid():
                try: os.kill(number, 0)
                except ProcessLookupError: continue
                alive.append(number)
        print(alive or "held")
        """
    ),
    "kills everybody": Hostile(
        """
        import os, signal
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGSTOP, signal.SIGKILL):
            for target in (1, os.getppid(), -1):
                try: os.kill(target, number)
                except (ProcessLookupError, PermissionError): pass
        print("held")
        """
    ),
    "traces its parent": Hostile(
        """
        import ctypes, os
        libc = ctypes.CDLL(None)
        print("held" if libc.ptrace(16, os.getppid(), 0, 0) == -1 else "attached")
        """
    ),
    "writes outside": Hostile(
        """
        import os
        written = []
        for folder in ("/", "/usr", "/usr/bin", "/etc", "/root", "/home", "/var", "/dev", os.path.dirname(os.__file__)):
            try:
                open(f"{folder}/nemotron-was-here", "w")
                written.append(folder)
            except OSError: pass
        print(written or "held")
        """
    ),
    "reads the machine's files": Hostile(
        """
        import os
        seen = [path for path in ("/etc/passwd", "/etc/shadow", "/var", "/home", "/proc/1", "/sys/kernel", "/run")
                if os.path.exists(path)]
        print(seen or "held")
        """
    ),
    "opens connections": Hostile(
        """
        import socket
        opened = []
        for family, place in ((socket.AF_INET, ("127.0.0.1", 22)), (socket.AF_INET, ("8.8.8.8", 53)),
                              (socket.AF_INET6, ("::1", 22)), (socket.AF_UNIX, "\\0abstract")):
            try:
                with socket.socket(family, socket.SOCK_STREAM) as one:
                    one.settimeout(1)
                    one.connect(place)
                opened.append(place)
            except OSError: pass
        print(opened or "held")
        """
    ),
    "opens sockets past the network": Hostile(
        """
        import socket
        opened = []
        for family in (16, 17, 38, 40):  # netlink, packets, the kernel's ciphers, the machine's host
            try: socket.socket(family, socket.SOCK_DGRAM).close(); opened.append(family)
            except OSError: pass
        print(opened or "held")
        """
    ),
    "makes namespaces": Hostile(
        """
        import ctypes
        libc = ctypes.CDLL(None)
        made = [libc.unshare(0x10000000), libc.unshare(0x20000),
                libc.mount(b"tmpfs", b"/scratch", b"tmpfs", 0, None), libc.chroot(b"/scratch")]
        print("held" if all(one == -1 for one in made) else made)
        """
    ),
    "becomes root": Hostile(
        """
        import os
        became = []
        for change in (os.setuid, os.setgid):
            try: change(0); became.append(change)
            except OSError: pass
        print(became or "held")
        """
    ),
    "fills shared memory": Hostile(
        """
        import ctypes
        libc = ctypes.CDLL(None)
        made = [libc.shmget(0, 2**28, 0o1600), libc.syscall(319, b"memory", 0)]
        print("held" if all(one == -1 for one in made) else made)
        """
    ),
    "raises its limits": Hostile(
        """
        import resource
        try:
            resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))
            print("raised")
        except (ValueError, OSError): print("held")
        """
    ),
    "daemonises": Hostile(
        """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0: time.sleep(600)
            os._exit(0)
        print("held")
        """
    ),
    "crashes": Hostile("import os\nprint('held', flush=True)\nos.abort()"),
    "prints what is no text": Hostile("import sys\nsys.stdout.buffer.write(b'held\\n\\xff\\xfe\\x00')"),
}
ALL = ENDLESS | HELD


def attempt(hostile: Hostile, *, isolated: bool = True) -> Finished:
    """How a program ends."""
    limits = replace(hostile.limits, isolated=isolated, own_user=isolated)
    files = {"program.py": dedent(hostile.source)}
    return run_programs(files, [Program(python("program.py"))], limits)[-1]


def harm(hostile: Hostile, end: Finished) -> str:
    """What is wrong with an end; empty if nothing is."""
    if hostile.problems:
        return "" if end.problem in hostile.problems else f"not ended: {end}"
    said = end.stdout.splitlines()
    return "" if not end.problem and said[:1] == [hostile.held] else f"not held: {end}"


def main() -> int:
    """Try all of them, several at once; say what did harm."""
    os.environ[SECRET] = "secret"
    with ThreadPoolExecutor(4) as threads:
        ends = dict(zip(ALL, threads.map(attempt, ALL.values()), strict=True))
    found = {name: text for name, end in ends.items() if (text := harm(ALL[name], end))}
    for name, text in found.items():
        print(f"{name}: {text}"[:600])
    left = jail.descendants(os.getpid())
    print(f"user {os.geteuid()}: {len(ALL)} programs, {len(found)} did harm, {len(left)} processes left")
    return bool(found or left)


if __name__ == "__main__":
    sys.exit(main())
