"""Ways in: the quickstart without the repository, what a machine can run, the list of runs, completion in a shell."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import faulty
import pytest
from report_run import build_run
from typer.testing import CliRunner, Result

from recover import cli
from recover.base import dist
from recover.base.errors import TrainingError
from recover.cli import COMMANDS, app
from recover.commands import start
from recover.config import named
from recover.config.recipe import load_recipe
from recover.run import stages
from recover.run.draft import Machine
from recover.text.rows import NotHad

ROOT = Path(__file__).parent.parent
EMBEDDED = ROOT / "recover" / "embedded" / "recipes"


def call(*arguments: str, columns: int = 200) -> Result:
    return CliRunner().invoke(app, [*arguments], env={"COLUMNS": str(columns), "TERM": "dumb"})


def test_the_shipped_recipe_is_the_repositorys():
    """A wheel holds nothing of recipes/: the quickstart is there twice, and the same."""
    (shipped,) = EMBEDDED.glob("*.yaml")
    assert shipped.read_bytes() == (ROOT / "recipes" / shipped.name).read_bytes()


def test_quickstart_runs_the_shipped_recipe(monkeypatch):
    asked: list[Any] = []
    monkeypatch.setattr(stages, "run", lambda recipe, root, **how: asked.append((recipe, root, how)))
    assert call("quickstart", "train.tokens=600", "--runs", "there").exit_code == 0
    assert call("run", "embedded:quickstart", "train.tokens=600", "--fresh").exit_code == 0
    wanted = load_recipe(ROOT / "recipes" / "quickstart.yaml", ["train.tokens=600"])
    assert [recipe for recipe, _, _ in asked] == [wanted, wanted]
    assert (asked[0][1], asked[0][2]) == (Path("there"), {"until": "report", "start": None, "timed": False})
    unknown = call("run", "embedded:quickstrat")
    assert unknown.exit_code == 2 and "There are: " in unknown.stderr and "quickstart" in unknown.stderr


def test_runs_are_listed_the_newest_first(tmp_path):
    for name, finished in (("first", "2026-01-02T03:04:05+00:00"), ("second", "2026-02-02T03:04:05+00:00")):
        root = build_run(tmp_path / "runs", name=name)
        stamp = {"stage": "dense", "finished": finished, "fingerprint": {}}
        (root / "dense" / "DONE.json").write_text(json.dumps(stamp))
    (tmp_path / "runs" / "no-run").mkdir()
    (tmp_path / "runs" / "file.txt").write_text("of others")
    lines = [line.split() for line in call("list", str(tmp_path / "runs")).stdout.splitlines()]
    names = [line[0] for line in lines if line and line[0] in ("first", "second", "no-run", "file.txt")]
    assert names == ["second", "first"] and lines[0][:3] == ["2", "runs", "in"]
    broken = tmp_path / "runs" / "first" / "before" / "measure.json"
    broken.write_text("{")
    done = call("list", str(tmp_path / "runs"))
    assert done.exit_code == 0 and "corrupt JSON" in done.stdout and "second" in done.stdout
    shutil.rmtree(tmp_path / "runs" / "first")
    assert call("list", str(tmp_path / "runs")).stdout.split()[:3] == ["1", "run", "in"]


def test_where_no_run_is_that_is_said(tmp_path):
    gone = call("list", str(tmp_path / "gone"))
    assert gone.exit_code == 1 and "no such folder" in gone.stderr
    empty = call("list", str(tmp_path))
    assert empty.exit_code == 1 and "holds no run; `recover quickstart` makes one" in empty.stderr


def test_doctor_says_what_is_here(monkeypatch):
    done = call("doctor")
    assert done.exit_code == 0, done.output
    for what in ("python", "torch", "deepspeed", "memory", "disk, free here", "hub", "HF_HUB_OFFLINE is set"):
        assert what in done.stdout
    assert all(name in done.stdout for name in (*named.task_names(), *named.blend_names()))
    assert "LoRA recovery, rank 16, 2,048 tokens at once\n" in done.stdout


def test_doctor_says_more_only_of_a_blend_that_has_something(monkeypatch):
    def none_had(*_, **__):
        raise NotHad("not here", ["pip install a"])

    rows = [*start._blend("general")]
    assert [row[1] for row in rows] == ["yes"] and all(not row[2] or row[2].startswith("more by ") for row in rows)
    monkeypatch.setattr(start, "first_had", none_had)
    ((_, here, brings),) = start._blend("general")
    assert (here, brings) == ("no", "pip install a")


def test_doctor_measures_sizes_by_the_plans_arithmetic():
    def said(memory: int) -> dict[str, str]:
        return {name: fits for name, fits, _ in start._sizes(Machine("cuda", "card", memory, "bfloat16"))}

    assert {*said(2 * 10**9).values()} == {"no"}
    card = said(24 * 10**9)
    assert card["3B (Llama-3.2-3B)"] == "yes" and card["7B (Qwen2.5-7B)"] == "with gradient checkpointing"
    assert card["13B (Llama-2-13B)"] == "no"


def test_doctor_fails_where_a_library_is_too_old(monkeypatch):
    monkeypatch.setattr(start.metadata, "requires", lambda name: ["torch>=99.0", "gguf>=1; extra == 'gguf'"])
    done = call("doctor")
    assert done.exit_code == 2 and "too old: torch>=99.0" in done.stderr


def test_doctor_says_what_is_newer_than_what_was_tested_and_goes_on(monkeypatch):
    monkeypatch.setattr(start.metadata, "requires", lambda name: ["torch>=1.0,<2.0"])
    done = call("doctor")
    assert done.exit_code == 0, done.output
    assert "newer than what was tested: torch" in done.stdout and "too old" not in done.output


def test_deepspeed_is_asked_for_by_name_where_it_is_missing(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(dist.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        TrainingError, match=r"not installed: pip install 'recover\[deepspeed\]', or take a launch file"
    ):
        dist.start()


OFFERED = [
    ("recover qui", 1, ["quickstart"]),
    ("recover ", 1, [*COMMANDS]),
    ("recover run my.yaml train.lora.ra", 3, ["train.lora.rank="]),
    ("recover run my.yaml train.data.0.sh", 3, ["train.data.0.share="]),
    ("recover run --fr", 2, ["--from", "--fresh"]),
    ("recover measure model --suite ch", 4, ["chat", "choice"]),
    ("recover measure model --tasks gsm8k_", 4, ["gsm8k_5shot"]),
]


def test_a_shell_is_offered_what_may_follow(tmp_path):
    def complete():
        for line, word, _ in OFFERED:
            os.environ.update(_RECOVER_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(word))
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
                cli.main()
            print(json.dumps(said.getvalue().split()))

    code, output = faulty.run(tmp_path / "shell", complete)
    assert code == 0, output
    assert [sorted(json.loads(line)) for line in output.splitlines()] == [sorted(row[2]) for row in OFFERED]


def test_completion_can_be_installed():
    done = run(sys.executable, "-m", "recover", "--show-completion", "bash", cwd=ROOT)
    assert "complete -o default -F _recover_completion recover" in done.stdout


# What setuptools builds of a copy without the repository's history, and what is in neither.
BUILD = "from setuptools import build_meta as b; print(b.build_wheel({out!r})); print(b.build_sdist({out!r}))"


def test_no_link_is_tracked():
    """A checkout puts a tracked link where an ignored folder of its name lies, and that folder's files are gone."""
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    links = [line.split("\t")[1] for line in listed.stdout.splitlines() if line.startswith("120000 ")]
    assert not links


def checkout(folder: Path) -> Path:
    """The files that git would hand out, in another folder."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def run(*command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env={**kept, **env})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def environment(folder: Path, package: Path) -> Path:
    """The program of a fresh environment that has this package, and of the libraries what this one has."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(package), cwd=folder)
    return folder / "bin" / "recover"


SMALL = (
    *("train.tokens=600", "train.epochs=1", "measure.limit=6", "measure.sampling=null", "probe.samples=2"),
    *("probe.steps=4", "probe.sublayers=false", "probe.items=0", "prune.calibration.samples=4"),
)


@pytest.mark.slow
def test_a_wheel_runs_the_quickstart_without_the_repository(tmp_path):
    source, out, work = checkout(tmp_path / "source"), tmp_path / "dist", tmp_path / "work"
    work.mkdir()
    run(sys.executable, "-c", BUILD.format(out=str(out)), cwd=source)
    (wheel,) = out.glob("*.whl")
    (archive,) = out.glob("*.tar.gz")
    shipped = {str(path.relative_to(ROOT)) for path in (ROOT / "recover" / "named").rglob("*") if path.is_file()}
    shipped |= {str(path.relative_to(ROOT)) for path in (ROOT / "recover" / "embedded").rglob("*") if path.is_file()}
    assert len(shipped) > 20 and shipped <= {*zipfile.ZipFile(wheel).namelist()}
    with tarfile.open(archive) as held:
        assert shipped <= {name.partition("/")[2] for name in held.getnames()}
    program = str(environment(tmp_path / "fresh", wheel))
    where = run(str(Path(program).with_name("python")), "-c", "import recover; print(recover.__file__)", cwd=work)
    assert str(tmp_path / "fresh") in where.stdout
    run(program, "quickstart", *SMALL, cwd=work, OMP_NUM_THREADS="1")
    assert (work / "checkpoints" / "quickstart" / "report.html").is_file()
    assert "quickstart" in run(program, "list", cwd=work).stdout
    assert "blend:general" in run(program, "doctor", cwd=work).stdout


@pytest.mark.slow
def test_a_source_archive_builds_and_installs(tmp_path):
    source, out = checkout(tmp_path / "source"), tmp_path / "dist"
    files = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
    run(sys.executable, "-c", BUILD.format(out=str(out)), cwd=source)
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as held:
        held.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert not [name for name in files if not name.startswith(".") and not (unpacked / name).is_file()]
    run(sys.executable, "-c", BUILD.format(out=str(tmp_path / "again")), cwd=unpacked)
    (wheel,) = (tmp_path / "again").glob("*.whl")
    program = str(environment(tmp_path / "fresh", wheel))
    assert "recover 0" in run(program, "--version", cwd=tmp_path).stdout
    assert "1,880,816" in run(program, "plan", "embedded:quickstart", cwd=tmp_path).stdout
