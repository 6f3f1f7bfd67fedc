"""Main memory that this process may have: the machine's, or less where a container or a batch system sets a limit.

Linux keeps such limits in groups of processes (cgroups, of version 1 and 2), one inside another. A process that takes
more than one of them allows is killed, whatever the machine has left.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROCESS, MACHINE, GROUPS = Path("/proc/self/cgroup"), Path("/proc/meminfo"), Path("/sys/fs/cgroup")


class Limit(NamedTuple):
    """Bytes that a group of processes may have, and that it has; pages of files that may be dropped are not counted."""

    most: int
    used: int


def total() -> int:
    """Bytes of the machine, or of the tightest limit on this process."""
    return min([_pages(), *(limit.most for limit in limits())])


def free() -> int:
    """Bytes that this process may still take."""
    there = _field(MACHINE, "MemAvailable:")
    left = _pages() // 2 if there is None else there * 1024  # not Linux
    return max(0, min([left, *(limit.most - limit.used for limit in limits())]))


def limits() -> Iterator[Limit]:
    """Those of the groups that this process is in, from the innermost outwards."""
    for line in _text(PROCESS).splitlines():
        _, _, rest = line.partition(":")
        kinds, _, path = rest.partition(":")
        if kinds == "":  # version 2
            root, names = GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            root, names = GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inside = root / path.strip("/")
        # Inside a container the path may be the host's, which is not there: then it is the root that has the limit.
        for group in (inside, *inside.parents):
            if not group.is_relative_to(root):
                break
            most, used = (_number(group / name) for name in names[:2])
            if most is not None and used is not None:
                yield Limit(most, max(0, used - (_field(group / "memory.stat", names[2]) or 0)))


def _pages() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")  # groups may have any bytes as their name
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None  # `max`: no limit


def _field(path: Path, name: str) -> int | None:
    """The number behind a name, in a file with one of each a line."""
    for line in _text(path).splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == name and words[1].isdecimal():
            return int(words[1])
    return None
