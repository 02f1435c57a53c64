"""Runs programs that nobody trusts. A script of its own, started by the sandbox; imports nothing but Python's library.

Three processes: the one that was started makes the namespaces; the second is the first of the new process namespace,
builds a root folder with nothing in it but Python, and outlives the programs; the third, as nobody, becomes a program.
What runs and its limits come as JSON on stdin; a line of JSON for each finished program goes to stdout.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import select
import signal
import struct
import sys
import time
from typing import Any, NoReturn

LIBC = ctypes.CDLL(None, use_errno=True)

NEW_NAMESPACES = 0x20000 | 0x20000000 | 0x40000000 | 0x8000000 | 0x4000000  # mounts, processes, network, IPC, host name
NEW_USER = 0x10000000
ANY_NAMESPACE = NEW_NAMESPACES | NEW_USER | 0x2000000 | 0x80  # and control groups, time
RDONLY, NOSUID, NODEV, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
RELATIME = 1 << 21
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER = 1, 4, 22, 38, 36
SCRATCH = "/scratch"
DEVICES = ("null", "zero", "full", "random", "urandom")
# Of the machine's folders only those that programs run from; links (bin -> usr/bin) stay links.
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives", "/nix/store")
#: Users above this have no account; each sandbox is another one, so that the kernel counts its processes alone.
FIRST_USER = 2_100_000_000

# System calls that a program has no use for: (x86_64, aarch64).
REFUSED = {
    "ptrace": (101, 117),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kexec_load": (246, 104),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "personality": (135, 92),
    "io_uring_setup": (425, 425),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "pidfd_getfd": (438, 438),
    "mount_setattr": (442, 442),
}
CLONE, CLONE3, SOCKET, SOCKETPAIR = (56, 220), (435, 435), (41, 198), (53, 199)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


class Impossible(Exception):
    """Why no isolation can be had here."""


def main() -> int:
    spec = json.load(sys.stdin)
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != spec["parent"]:
        return 1
    spec["number"] = os.getpid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        if spec["isolated"]:
            make_namespaces()
            return outlive(spec)
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
        os.chdir(spec["folder"])
        run_all(spec)
    except (Impossible, OSError) as error:
        report({"impossible": str(error)})
        return 1
    return 0


def make_namespaces() -> None:
    """Leave the machine's; as root directly, as anybody else within a user namespace. Raises Impossible."""
    user, group = os.geteuid(), os.getegid()
    if user == 0 and has_other_users() and LIBC.unshare(NEW_NAMESPACES) == 0:
        return
    call("unshare", NEW_NAMESPACES | NEW_USER)
    inside = user or 65534  # never root in there: a program must not get its capabilities
    for name, text in (("setgroups", "deny"), ("uid_map", f"{inside} {user} 1"), ("gid_map", f"{inside} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def has_other_users() -> bool:
    """Whether root may become somebody else: not as the only user of a user namespace, as in some containers."""
    with open("/proc/self/setgroups") as file:
        allowed = file.read().strip() == "allow"
    with open("/proc/self/uid_map") as file:
        spans = [tuple(map(int, line.split())) for line in file]
    return allowed and any(start <= 10_000 and start + count >= 60_000 for start, _, count in spans)


def outlive(spec: dict[str, Any]) -> int:
    """Start the first process of the namespace and wait for it; when this process is killed, so is all of the rest."""
    from_first, to_us = os.pipe()
    from_us, to_first = os.pipe()
    first = os.fork()
    if first == 0:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.write(to_us, b".")
        os.close(to_first)
        if not os.read(from_us, 1):  # our parent died before we were bound to it
            os._exit(1)
        for fd in (from_first, to_us, from_us):
            os.close(fd)
        code = 1
        try:
            LIBC.prctl(PR_SET_DUMPABLE, 0)
            build_root(spec)
            run_all(spec)
            code = 0
        except (Impossible, OSError) as error:
            report({"impossible": str(error)})
        finally:
            os._exit(code)
    os.read(from_first, 1)
    os.write(to_first, b".")
    return os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])


def build_root(spec: dict[str, Any]) -> None:
    """A root folder of its own: the system's programs and Python, read-only, a scratch folder of limited size."""
    shown = [path for path in (*SYSTEM, *spec["shown"]) if os.path.lexists(path)]
    mount(None, "/", None, REC | PRIVATE)
    # Nothing that is shown is below /proc, and nothing of it is needed any more.
    root = "/proc"
    mount("tmpfs", root, "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    for path in shown:
        show(path, root + path)
    os.makedirs(f"{root}/dev", exist_ok=True)
    for name in DEVICES:
        show(f"/dev/{name}", f"{root}/dev/{name}", device=True)
    os.mkdir(root + SCRATCH)
    size = spec["output_kib"] + spec["files_kib"] + 64
    mount("tmpfs", root + SCRATCH, "tmpfs", NOSUID | NODEV, f"size={size}k,nr_inodes=1024,mode=777")
    for link in ("/tmp", "/dev/shm"):
        if not os.path.lexists(root + link):  # it is there where a Python below it is shown; TMPDIR says scratch
            os.symlink(SCRATCH, root + link)
    mount(None, root, None, REMOUNT | BIND | RDONLY | NOSUID | NODEV)
    os.chdir(root)
    call("syscall", REFUSED["pivot_root"][architecture()[0]], b".", b".", where="pivot_root")
    call("umount2", b".", 2)  # the machine's own folders; 2: also if they are in use
    os.chdir(SCRATCH)


def show(path: str, target: str, *, device: bool = False) -> None:
    """Let a file or folder of the machine appear at `target`, read-only, with all that is mounted below it."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        if not os.path.lexists(target):
            os.symlink(os.readlink(path), target)
        return
    if os.path.exists(target) and not os.path.isdir(target):
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    mount(path, target, None, BIND | REC)
    kept = os.statvfs(target).f_flag  # those that a user namespace may not lift
    flags = kept & (NOSUID | 8 | 1024 | 2048) | (kept & 4096 and RELATIME) | REMOUNT | BIND | RDONLY | NOSUID
    mount(None, target, None, flags | (kept & NODEV if device else NODEV))
    if os.path.isdir(path):
        attributes = struct.pack("QQQQ", RDONLY | NOSUID | NODEV, 0, 0, 0)
        # Whatever is mounted below it too; before Linux 5.12 the programs' user has to suffice for that.
        LIBC.syscall(ctypes.c_long(442), ctypes.c_long(-100), target.encode(), 0x8000, attributes, len(attributes))


def run_all(spec: dict[str, Any]) -> None:
    """Run the programs one after another, and report each."""
    for name, text in spec["files"].items():
        with open(name, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
    report({"ready": True})
    for one in spec["runs"]:
        report(run(one, spec))


def run(one: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """Run one program to its end, or to that of its output; then nothing of it is left."""
    started = time.monotonic()
    stdin = os.memfd_create("stdin")
    with open(stdin, "wb", closefd=False) as file:
        file.write(one["stdin"].encode(errors="replace"))
    os.lseek(stdin, 0, os.SEEK_SET)
    out, out_end = os.pipe()
    err, err_end = os.pipe()
    program = os.fork()
    if program == 0:
        become(one["argv"], spec, (stdin, out_end, err_end))
    for fd in (stdin, out_end, err_end):
        os.close(fd)
    said = {out: bytearray(), err: bytearray()}
    limit, problem, status = spec["output_kib"] * 1024, "", None
    ended = os.pidfd_open(program)
    open_ends = {out, err}
    while status is None and not problem:
        for fd in select.select([ended, *open_ends], [], [], 1)[0]:
            if fd == ended:
                status = os.waitpid(program, 0)[1]
            elif chunk := os.read(fd, 65536):
                said[fd] += chunk
            else:
                open_ends.remove(fd)
        problem = "output" if sum(map(len, said.values())) > limit else ""
    end_all(program)
    for fd in open_ends:  # what was still on its way; nobody writes any more
        os.set_blocking(fd, False)
        with contextlib.suppress(BlockingIOError):
            while len(said[fd]) <= limit and (chunk := os.read(fd, 65536)):
                said[fd] += chunk
    for fd in (out, err, ended):
        os.close(fd)
    if sum(map(len, said.values())) > limit:
        problem = "output"
    return {
        "code": None if status is None else os.waitstatus_to_exitcode(status),
        "stdout": bytes(said[out][:limit]).decode(errors="replace"),
        "stderr": bytes(said[err][:limit]).decode(errors="replace")[-4000:],
        "problem": problem,
        "seconds": time.monotonic() - started,
    }


def become(argv: list[str], spec: dict[str, Any], stdio: tuple[int, int, int]) -> NoReturn:
    """Turn this process into a program, as nobody, with limits."""
    try:
        os.setsid()
        for fd, own in enumerate(stdio):
            os.dup2(own, fd)
        os.closerange(3, 4096)
        for signo in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(signo, signal.SIG_DFL)
        limit(spec)
        if os.geteuid() == 0 and spec["own_user"]:
            drop_user(spec["number"])
        LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        refuse_calls(sockets=spec["isolated"])
        os.execve(argv[0], argv, spec["environ"])
    except BaseException as error:
        os.write(2, f"the program was not started: {error}\n".encode())
    os._exit(126)


def limit(spec: dict[str, Any]) -> None:
    memory, seconds = spec["memory_mib"] * 2**20, int(spec["seconds"]) + 1
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: spec["output_kib"] * 1024,
        resource.RLIMIT_NOFILE: 128,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 256,
    }
    if spec["count_processes"]:
        # In a user namespace the jail's own two count too.
        limits[resource.RLIMIT_NPROC] = spec["processes"] + (0 if os.geteuid() == 0 else 2)
    for which, value in limits.items():
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def drop_user(number: int) -> None:
    """From root to a user that nobody is and no other sandbox has."""
    os.setgroups([])
    for user in (FIRST_USER + number, 10_000 + number % 50_000):
        try:
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            return
        except OSError as error:
            if error.errno != errno.EINVAL or user < FIRST_USER:
                raise


def refuse_calls(*, sockets: bool) -> None:
    """Let the kernel refuse what a program has no use for. sockets: whether those of this machine are allowed.

    Raises Impossible. A filter of classic BPF over struct seccomp_data: nr at 0, arch at 4, arguments at 16.
    """
    column, arch = architecture()
    load, equal, above, bits, ret = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill = 0x7FFF0000, 0x80000000

    def refuse(number: int) -> int:
        return 0x50000 | number

    program = [(load, 0, 0, 4), (equal, 1, 0, arch), (ret, 0, 0, kill), (load, 0, 0, 0)]
    if column == 0:  # the calls of the x32 kind
        program += [(above, 0, 1, 0x40000000), (ret, 0, 0, refuse(errno.ENOSYS))]
    for numbers in REFUSED.values():
        program += [(equal, 0, 1, numbers[column]), (ret, 0, 0, refuse(errno.EPERM))]
    # clone3 keeps its flags where a filter cannot look; libraries then use clone.
    program += [(equal, 0, 1, CLONE3[column]), (ret, 0, 0, refuse(errno.ENOSYS))]
    program += [(equal, 0, 4, CLONE[column]), (load, 0, 0, 16), (bits, 0, 1, ANY_NAMESPACE & ~0x80)]
    program += [(ret, 0, 0, refuse(errno.EPERM)), (ret, 0, 0, allow)]
    for numbers in (SOCKET, SOCKETPAIR):
        families = (1, 2, 10) if sockets else ()  # unix, IPv4, IPv6: in a namespace without any network
        program += [(equal, 0, 2 + 2 * len(families), numbers[column]), (load, 0, 0, 16)]
        for family in families:
            program += [(equal, 0, 1, family), (ret, 0, 0, allow)]
        program += [(ret, 0, 0, refuse(errno.EAFNOSUPPORT))]
    program += [(ret, 0, 0, allow)]
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    filter_ = struct.pack("HP", len(program), ctypes.addressof(buffer))
    if LIBC.prctl(PR_SET_SECCOMP, 2, ctypes.create_string_buffer(filter_, len(filter_)), 0, 0) != 0:
        raise Impossible(f"seccomp: {os.strerror(ctypes.get_errno())}")


def architecture() -> tuple[int, int]:
    """The column of the numbers above, and what the kernel calls this machine. Raises Impossible."""
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise Impossible(f"system calls of {machine} are not known")
    return ARCHITECTURES[machine]


def end_all(program: int) -> None:
    """End the program and whatever it has started."""
    if os.getpid() == 1:  # everything but us in this namespace, and nothing outside it
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)
    # Without a namespace: those below us, again until there are none; orphans come to us.
    for _ in range(1000):
        for child in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(child, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def descendants(pid: int) -> list[int]:
    """All processes below one, as far as /proc says."""
    found, todo = [], [pid]
    while todo:
        parent = todo.pop()
        try:
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children") as file:
                    children = [int(word) for word in file.read().split()]
                found += children
                todo += children
        except OSError:
            continue
    return found


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    parts = [text and text.encode() for text in (source, target, kind)]
    call("mount", *parts, ctypes.c_ulong(flags), options and options.encode(), where=target)


def call(name: str, *arguments: Any, where: str = "") -> None:
    """Call the C library. Raises Impossible."""
    if getattr(LIBC, name)(*arguments) != 0:
        at = f" {where}" if where else ""
        raise Impossible(f"{name}{at}: {os.strerror(ctypes.get_errno())}")


def report(line: dict[str, Any]) -> None:
    data = json.dumps(line).encode() + b"\n"
    while data:
        data = data[os.write(1, data) :]


if __name__ == "__main__":
    sys.exit(main())
