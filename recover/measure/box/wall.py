"""The wall around a program: Linux namespaces, a file system with nothing but Python's own packages, no rights.

`enter` is for the keeper, once: from then on it sees that file system and no network. `spawn` starts a process behind
the wall, first of a process namespace of its own: with it dies whatever it started.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from recover.measure.box.calls import Filter, filter_of, number_of

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
