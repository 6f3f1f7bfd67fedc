"""The wall around programs, and the process that starts programs and their tests behind it and ends them in time.

The wall is Linux namespaces, a file system with nothing but Python's own packages, no rights. `enter` is for the
keeper, once: from then on it sees that file system and no network. `spawn` starts a process behind the wall, first of a
process namespace of its own: with it dies whatever it started. Which system calls no program there may make is a filter
that Linux itself applies (seccomp): `filter_of`.

The keeper is told on a socket, which comes as its standard input: `ready?`, then jobs with their descriptors. It reads
no program and no test itself, so none of it lies in the memory that a program is a copy of. It takes one pair at a
time.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import importlib
import json
import os
import platform
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recover.measure.box import judge

# name -> number on x86-64, on arm64; None: that machine has none
REFUSED: dict[str, tuple[int, int | None]] = {
    # other programs and processes
    "fork": (57, None),
    "vfork": (58, None),
    "clone": (56, 220),
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    # the network
    "socket": (41, 198),
    # namespaces, mounts, devices, other views of files
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "mknod": (133, None),
    "mknodat": (259, 33),
    # memory that no limit of a process counts
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # parts of the kernel that programs of a test have no use for
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "userfaultfd": (323, 282),
    "io_setup": (206, 0),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "personality": (135, 92),
    "modify_ldt": (154, None),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "iopl": (172, None),
    "ioperm": (173, None),
    "fanotify_init": (300, 262),
    "syslog": (103, 116),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
}
CLONE3 = 435  # refused as unknown: its flags lie in memory, where no filter sees them
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
OWN = {
    "x86_64": {"clone": 56, "capset": 126, "pivot_root": 155},
    "aarch64": {"clone": 220, "capset": 91, "pivot_root": 41},
}
X32 = 0x40000000  # the second numbering of x86-64
LOAD, EQUAL, AT_LEAST, GIVE = 0x20, 0x15, 0x35, 0x06
KILL, ALLOW, ERROR = 0x80000000, 0x7FFF0000, 0x00050000
NUMBER, MACHINE = 0, 4  # offsets in what the filter is shown


class Filter(ctypes.Structure):
    """What prctl takes: the count of instructions and where they lie."""

    _fields_ = (("count", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def number_of(call: str) -> int:
    """The number of one of our own calls on this machine. Raises OSError on a machine whose numbers are not known."""
    machine = platform.machine()
    if machine not in OWN:
        raise OSError(f"processor {machine}: its system calls are not known here, those of {', '.join(OWN)} are")
    return OWN[machine][call]


def filter_of(machine: str) -> bytes:
    """The instructions that refuse the calls above and allow all others."""
    column = list(AUDIT).index(machine)
    refused = sorted({number for each in REFUSED.values() if (number := each[column]) is not None})
    tests = [(EQUAL, each, ERROR | errno.EPERM) for each in refused]
    tests.append((EQUAL, CLONE3, ERROR | errno.ENOSYS))
    if machine == "x86_64":
        tests.insert(0, (AT_LEAST, X32, ERROR | errno.ENOSYS))
    lines = [(LOAD, 0, 0, MACHINE), (EQUAL, 1, 0, AUDIT[machine]), (GIVE, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    for test, value, answer in tests:
        lines += [(test, 0, 1, value), (GIVE, 0, 0, answer)]
    lines.append((GIVE, 0, 0, ALLOW))
    return b"".join(struct.pack("<HBBI", *line) for line in lines)


NEW_MOUNTS, NEW_NAMES, NEW_IPC, NEW_USERS = 0x00020000, 0x04000000, 0x08000000, 0x10000000
NEW_PROCESSES, NEW_NETWORK = 0x20000000, 0x40000000
READ_ONLY, NO_SETUID, NO_DEVICES, NO_EXEC, REMOUNT = 1, 2, 4, 8, 32
NO_ACCESS_TIMES, NO_FOLDER_TIMES, BIND, RECURSIVE, PRIVATE, RELATIVE_TIMES = 1024, 2048, 4096, 16384, 1 << 18, 1 << 21
DETACH = 2
DIE_WITH_PARENT, SECCOMP, NO_NEW_RIGHTS, BY_FILTER = 1, 22, 38, 2
CAPABILITIES_3 = 0x20080522
NOBODY = 65534
STAGE = "/tmp"  # the new root is mounted here, seen by the keeper alone
WORK = "/tmp"  # where a program may write
FOLDER_BYTES, FOLDER_FILES = 2**24, 256
DEVICES = ("/dev/null", "/dev/urandom")
PACKAGES = ("site-packages", "dist-packages")  # of others, within Python's own

libc = ctypes.PyDLL(None, use_errno=True)  # PyDLL: a fork by hand is made with the interpreter held


def _done(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    call = libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    _done(call, f"mount {target}")


def own_namespaces() -> bool:
    """Leave the machine's namespaces; gives whether that was done as root, who needs no user namespace.

    Raises OSError where that is not allowed.
    """
    spaces = NEW_MOUNTS | NEW_NAMES | NEW_IPC | NEW_PROCESSES | NEW_NETWORK
    user, group = os.geteuid(), os.getegid()
    if user == 0 and libc.unshare(spaces) == 0:
        return True
    _done(libc.unshare(spaces | NEW_USERS), "namespaces")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{NOBODY} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{NOBODY} {group} 1")
    return False


def enter(folders: list[str]) -> None:
    """See nothing but `folders`, read-only at their places, two devices and an empty folder."""
    _mount("", "/", "", RECURSIVE | PRIVATE)
    sources = {place: os.open(place, os.O_PATH) for place in (*folders, *DEVICES)}
    _mount("tmpfs", STAGE, "tmpfs", NO_SETUID | NO_DEVICES, "size=1m,mode=755")
    for place, source in sources.items():
        target = Path(STAGE + place)
        target.parent.mkdir(parents=True, exist_ok=True)
        if place in DEVICES:
            target.touch()
        else:
            target.mkdir(exist_ok=True)
        _mount(f"/proc/self/fd/{source}", str(target), "", BIND)
        _read_only(target)
        os.close(source)
    Path(STAGE + WORK).mkdir(exist_ok=True)
    os.chdir(STAGE)
    _done(libc.syscall(number_of("pivot_root"), b".", b"."), "pivot_root")
    _done(libc.umount2(b".", DETACH), "the machine's files")
    os.chdir("/")
    _mount("", "/", "", REMOUNT | BIND | READ_ONLY | NO_SETUID | NO_DEVICES)


def _read_only(folder: Path) -> None:
    found = os.statvfs(folder).f_flag  # what a mount forbids already has to be said again
    kept = found & (NO_EXEC | NO_ACCESS_TIMES | NO_FOLDER_TIMES | NO_DEVICES)
    kept |= RELATIVE_TIMES if found & 4096 else 0
    kept |= NO_DEVICES if folder.is_dir() else 0
    _mount("", str(folder), "", REMOUNT | BIND | READ_ONLY | NO_SETUID | kept)
    for name in PACKAGES:
        if (folder / name).is_dir():
            _mount("tmpfs", str(folder / name), "tmpfs", READ_ONLY | NO_SETUID | NO_DEVICES, "size=4k,mode=755")


def fork(spaces: int = 0) -> int:
    """As os.fork, the child in new namespaces."""
    api = ctypes.pythonapi
    api.PyOS_BeforeFork()
    child = libc.syscall(number_of("clone"), ctypes.c_ulong(spaces | signal.SIGCHLD), *[ctypes.c_ulong(0)] * 4)
    error = ctypes.get_errno()
    if child == 0:
        api.PyOS_AfterFork_Child()
    else:
        api.PyOS_AfterFork_Parent()
    if child < 0:
        raise OSError(error, f"a process of its own: {os.strerror(error)}")
    return child


def die_with_parent() -> None:
    _done(libc.prctl(DIE_WITH_PARENT, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0), "prctl")


def spawn(work: Callable[[], int], *, walled: bool, root: bool, limits: dict[str, int]) -> int:
    """The number of a new process that does `work`; without a wall it has its limits only."""
    child = fork(NEW_PROCESSES | NEW_MOUNTS | NEW_IPC) if walled else os.fork()
    if child:
        return child
    code = 125
    try:
        os.setsid()  # its group is its own: a signal to the group reaches nobody else
        if walled:
            options = f"size={FOLDER_BYTES},nr_inodes={FOLDER_FILES},mode=700,uid={NOBODY},gid={NOBODY}"
            _mount("tmpfs", WORK, "tmpfs", NO_SETUID | NO_DEVICES, options)
            os.chdir(WORK)
        for name, limit in limits.items():
            if hasattr(resource, f"RLIMIT_{name}"):
                lower(getattr(resource, f"RLIMIT_{name}"), limit)
        if walled:
            _without_rights(root)
        code = work()
    except MemoryError:
        code = 124
    finally:
        os._exit(code)


def lower(kind: int, limit: int) -> None:
    """The limit, or what holds already where that is less."""
    _, most = resource.getrlimit(kind)
    limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
    resource.setrlimit(kind, (limit, limit))


def _without_rights(root: bool) -> None:
    if root:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header, none = (ctypes.c_uint32 * 2)(CAPABILITIES_3, 0), (ctypes.c_uint32 * 6)()
    _done(libc.syscall(number_of("capset"), header, none), "capset")
    _done(libc.prctl(NO_NEW_RIGHTS, ctypes.c_ulong(1), 0, 0, 0), "prctl")
    instructions = filter_of(platform.machine())
    refused = Filter(len(instructions) // 8, instructions)
    _done(libc.prctl(SECCOMP, ctypes.c_ulong(BY_FILTER), ctypes.byref(refused), 0, 0), "seccomp")


def own_packages() -> list[str]:
    """The folders of Python's own packages, none within another."""
    found = sorted({os.path.realpath(place) for place in sys.path if os.path.isdir(place)})
    return [place for place in found if not any(place.startswith(f"{other}/") for other in found)]


CONTROL = 0
LINK, SOURCE, VERDICT = 3, 4, 5  # descriptors of a program and of its tests; all others are closed
DESCRIPTORS = 64
PAUSE = 0.002  # seconds between looks at whether they have ended
ENDING = 1.0  # seconds between a program's last word and its end
# Imported before the wall goes up: what they need of the machine's libraries is then loaded.
LEFT_OUT = ("_test", "_xx", "xx", "_tkinter", "readline", "_curses", "_ctypes_test")
USUAL = ("typing", "re", "math", "collections", "itertools", "functools", "heapq", "bisect", "string", "copy", "random")


def prepare(walled: bool) -> bool:
    """Whether the keeper is root; behind the wall from here on, if there is to be one."""
    for path in Path(os.path.dirname(os.__file__)).glob("lib-dynload/*.so") if walled else ():
        if not path.name.startswith(LEFT_OUT):
            with contextlib.suppress(Exception):
                importlib.import_module(path.name.partition(".")[0])
    for name in USUAL:
        importlib.import_module(name)
    if not walled:
        return False
    root = own_namespaces()
    keeper = os.fork()
    if keeper:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(keeper, 0)[1]) and 1)
    die_with_parent()
    enter(own_packages())
    return root


def main() -> None:
    walled = sys.argv[1] == "walled"
    control = socket.socket(fileno=os.dup(CONTROL))
    try:
        root = prepare(walled)
    except Exception as error:
        control.send(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        return
    null = os.open(os.devnull, os.O_RDWR)  # the one behind the wall, which nobody can touch
    for each in (0, 1, 2):
        os.dup2(null, each)
    os.close(null)
    sys.orig_argv[:] = []
    gc.freeze()
    control.send(json.dumps({"root": root}).encode())
    while True:
        told, descriptors, _, _ = socket.recv_fds(control, 4096, 8)
        if not told:
            return
        try:
            ended = job(control, json.loads(told), descriptors, walled=walled, root=root)
        except Exception as error:
            ended = {"error": f"{type(error).__name__}: {error}"}
        control.send(json.dumps(ended).encode())


def job(control: socket.socket, limits: dict[str, Any], descriptors: list[int], *, walled: bool, root: bool) -> Any:
    """Run a program and its tests; gives the program's exit code, or None if time was up."""
    if walled:
        return _pair(control, limits, descriptors, root, None)
    folder = tempfile.mkdtemp()
    try:
        return _pair(control, limits, descriptors, root, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _pair(
    control: socket.socket, limits: dict[str, Any], descriptors: list[int], root: bool, folder: str | None
) -> Any:
    """As `job`, without a wall if they are given a `folder` to work in."""
    seconds = limits.pop("seconds")
    source, theirs, test, ours, verdict = descriptors
    walled = folder is None

    def run_program() -> int:
        _keep({theirs: LINK, source: SOURCE}, folder)
        sys.argv = [""]
        return judge.serve(SOURCE, LINK)

    def run_tests() -> int:
        _keep({ours: LINK, test: SOURCE, verdict: VERDICT}, folder)
        return judge.run(SOURCE, LINK, VERDICT)

    children = [spawn(each, walled=walled, root=root, limits=limits) for each in (run_program, run_tests)]
    for each in descriptors:
        os.close(each)
    codes: dict[int, int] = {}
    _wait(control, children, codes, children[1], seconds)
    if codes.get(children[1]) == judge.PROGRAM_ENDED:
        _wait(control, children, codes, children[0], ENDING)
    for child in children:
        _end(child, walled, child in codes)
    return {"late": children[1] not in codes, "code": codes.get(children[0])}


def _wait(control: socket.socket, children: list[int], codes: dict[int, int], last: int, seconds: float) -> None:
    """Until `last` has ended, or the side that is at `control`, or time is up; `codes` gets the exit codes."""
    until = time.monotonic() + seconds
    # Nothing is said on `control` meanwhile: what there is to read is its end.
    while last not in codes and time.monotonic() < until and not select.select([control], [], [], PAUSE)[0]:
        for child in set(children) - set(codes):
            number, status = os.waitpid(child, os.WNOHANG)
            if number:
                codes[child] = os.waitstatus_to_exitcode(status)


def _keep(places: dict[int, int], folder: str | None) -> None:
    """These descriptors at their places, the standard ones, and no other; work in `folder`."""
    os.chdir(folder or ".")
    high = {os.dup2(old, DESCRIPTORS // 2 + place): place for old, place in places.items()}
    for old, place in high.items():
        os.dup2(old, place)
    os.closerange(LINK + len(places), 4 * DESCRIPTORS)


def _end(child: int, walled: bool, ended: bool) -> None:
    if not walled:  # behind the wall it is the first of its namespace, which ends with it
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
