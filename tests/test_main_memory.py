"""Main memory: the machine's, and the tightest limit of a container or a batch system on this process."""

from __future__ import annotations

import pytest

from recover.base import main_memory

GIB = 2**30
NO_LIMIT = 9223372036854771712  # of version 1


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Writes the files of a machine with 64 GiB, of which 40 are available; the limits come from the test."""
    monkeypatch.setattr(main_memory, "PROCESS", tmp_path / "cgroup")
    monkeypatch.setattr(main_memory, "MACHINE", tmp_path / "meminfo")
    monkeypatch.setattr(main_memory, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(main_memory, "_pages", lambda: 64 * GIB)
    (tmp_path / "meminfo").write_text(f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable: {40 * GIB // 1024} kB\n")

    def write(process: str, **groups: str) -> None:
        (tmp_path / "cgroup").write_text(process)
        for file, text in groups.items():
            path = tmp_path / "groups" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


def test_without_groups_it_is_the_machines(system):
    assert (main_memory.total(), main_memory.free()) == (64 * GIB, 40 * GIB)
    system("0::/\n")
    assert (main_memory.total(), main_memory.free()) == (64 * GIB, 40 * GIB)


def test_a_container_of_version_2_where_pages_of_files_may_be_dropped(system):
    stat = f"anon 5\ninactive_file {GIB}\n"
    system("0::/\n", **{"memory.max": f"{16 * GIB}\n", "memory.current": f"{6 * GIB}\n", "memory.stat": stat})
    assert (main_memory.total(), main_memory.free()) == (16 * GIB, 11 * GIB)


def test_the_tightest_of_groups_inside_one_another_holds(system):
    system(
        "1:cpu:/\n0::/batch/job7\n",
        **{"batch/memory.max": f"{32 * GIB}", "batch/memory.current": f"{30 * GIB}"},
        **{"batch/job7/memory.max": "max", "batch/job7/memory.current": f"{2 * GIB}"},
    )
    assert (main_memory.total(), main_memory.free()) == (32 * GIB, 2 * GIB)


def test_version_1_whose_path_is_the_hosts(system):
    system(
        "9:name=systemd:/\n4:cpuset,memory:/docker/abc\n",
        **{"memory/memory.limit_in_bytes": f"{8 * GIB}", "memory/memory.usage_in_bytes": f"{9 * GIB}"},
        **{"memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {2 * GIB}"},
    )
    assert (main_memory.total(), main_memory.free()) == (8 * GIB, GIB)


def test_a_group_without_a_limit_sets_none(system):
    system("4:memory:/a\n", **{"memory/a/memory.limit_in_bytes": f"{NO_LIMIT}", "memory/a/memory.usage_in_bytes": "5"})
    assert (main_memory.total(), main_memory.free()) == (64 * GIB, 40 * GIB)


def test_a_group_that_is_over_its_limit_leaves_nothing(system):
    system("0::/a\n", **{"a/memory.max": f"{GIB}", "a/memory.current": f"{2 * GIB}"})
    assert main_memory.free() == 0


def test_a_group_whose_name_is_no_text_has_its_limit(system, tmp_path):
    system("", **{"caf\udce9/memory.max": f"{GIB}", "caf\udce9/memory.current": "0"})
    (tmp_path / "cgroup").write_bytes(b"0::/caf\xe9\n")
    assert (main_memory.total(), main_memory.free()) == (GIB, GIB)
