"""The system calls that no program behind the wall may make, as a filter that Linux itself applies (seccomp)."""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

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
