"""The wall around programs that a model wrote: hostile ones get nowhere, whoever runs them, or are not run at all."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hostile import WHAT, Hostile, got_somewhere, hostile, table

from recover.measure.sandbox import Keeper, why_no_wall

HERE = Path(__file__).parent
PROGRAMS = hostile()
NOBODY = 65534
ROOTS = 1 << 13 | 1 << 18 | 1 << 27  # raw packets, chroot, mknod: a root of a container may lack them
walled = pytest.mark.skipif(bool(why_no_wall()), reason=f"this machine has no wall: {why_no_wall()}")
# In a user namespace of their own, programs are told that no further namespace can be had, as in many containers.
NO_NAMESPACES = "for each in user mnt pid net; do echo 0 > /proc/sys/user/max_${each}_namespaces; done; exec "


def is_root():
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return os.geteuid() == 0 and int(status["CapEff"], 16) & ROOTS == ROOTS


def named(programs):
    return pytest.mark.parametrize("program", programs, ids=[f"{each.kind}: {each.name}" for each in programs])


@pytest.fixture(scope="module")
def keeper():
    with Keeper() as found:
        yield found


@pytest.fixture(scope="module")
def unconfined():
    with Keeper(confined=False) as found:
        yield found


@walled
@named(PROGRAMS)
def test_a_hostile_program_gets_nowhere(program: Hostile, keeper):
    assert got_somewhere(program, keeper) == []


@named([each for each in PROGRAMS if each.alone in ("all", *(["root"] if is_root() else []))])
def test_without_a_wall_it_would(program: Hostile, unconfined):
    assert got_somewhere(program, unconfined) != []


@named([each for each in PROGRAMS if each.kind == "fakes a pass" and not each.alone])
def test_a_pass_is_not_faked_without_a_wall_either(program: Hostile, unconfined):
    assert got_somewhere(program, unconfined) == []


def python_of_all():
    """A Python that another user can start with these folders; None if there is none."""
    for each in (sys.executable, "/usr/bin/python3"):
        command = [each, "-c", "import sys; import hostile; sys.exit(sys.version_info < (3, 11))"]
        try:
            if (
                subprocess.run(command, user=NOBODY, env=environment(), capture_output=True, check=False).returncode
                == 0
            ):
                return each
        except OSError:
            continue
    return None


def environment():
    return {"PATH": os.environ["PATH"], "PYTHONPATH": f"{HERE.parent}:{HERE}", "PYTHONDONTWRITEBYTECODE": "1"}


def all_of_them(command, **options):
    found = subprocess.run(
        command, env=environment(), capture_output=True, text=True, check=False, cwd="/", timeout=300, **options
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@walled
@pytest.mark.skipif(os.geteuid() != 0, reason="whoever runs this is a normal user already")
def test_hostile_programs_get_nowhere_when_a_normal_user_runs_them():
    if not (python := python_of_all()):
        pytest.skip("no Python that another user can start")
    command = [python, str(HERE / "hostile.py")]
    found = all_of_them(command, user=NOBODY, group=NOBODY, extra_groups=[])
    assert found == {"run": len(PROGRAMS), "got somewhere": {}}


@pytest.mark.skipif(not shutil.which("unshare"), reason="unshare is not installed")
def test_hostile_programs_are_not_run_where_no_namespaces_are_to_be_had():
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", f'{NO_NAMESPACES}"$0" "$1"']
    if subprocess.run([*command, "true", ""], capture_output=True, check=False).returncode:
        pytest.skip("no user namespace to forbid namespaces in")
    found = all_of_them([*command, sys.executable, str(HERE / "hostile.py")])
    assert set(found) == {"no wall"} and "namespaces: No space left on device" in found["no wall"]


def descendants(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [each for child in children for each in (int(child), *descendants(int(child)))]


def runs(pid):
    """Whether the process is there and has not ended; whoever started it may still have to be told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(found, seconds=10.0):
    end = time.monotonic() + seconds
    while not found() and time.monotonic() < end:
        time.sleep(0.02)
    return found()


@pytest.mark.parametrize("confined", [pytest.param(True, marks=walled), False])
def test_programs_die_with_the_process_that_measures(confined):
    code = f"from recover.measure.sandbox import run_program; run_program('while True: pass', confined={confined})"
    process = subprocess.Popen([sys.executable, "-c", code], env=environment(), cwd="/")
    try:
        # the keeper (behind the wall one more, the first of its namespace), a program, its tests
        assert until(lambda: len(descendants(process.pid)) == 3 + confined)
        started = descendants(process.pid)
    finally:
        process.kill()
        process.wait()
    assert until(lambda: not any(map(runs, started)))


def test_the_table_of_the_docs_is_that_of_the_programs():
    assert len(PROGRAMS) > 100 and len({(each.kind, each.name) for each in PROGRAMS}) == len(PROGRAMS)
    assert {each.kind for each in PROGRAMS} == set(WHAT)
    page = (HERE.parent / "docs" / "security.md").read_text()
    named = re.findall(r"`((?:tests|recover)/[\w/]+\.(?:py|txt))`", page)
    assert len(set(named)) > 10 and all((HERE.parent / each).is_file() for each in named)
    assert table() in page and f"{len(PROGRAMS)} programs that try" in page
    assert f"{len(PROGRAMS)} hostile programs" in (HERE.parent / "README.md").read_text()
