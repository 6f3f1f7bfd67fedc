"""In a folder that holds modules of well-known names, none of them is ever imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import QUICKSTART, SMALL

from recover.base import safe_path
from recover.config.recipe import embedded

ROOT = Path(__file__).parent.parent
MODULES = (
    *("argparse.py", "typing_extensions.py", "json/__init__.py", "importlib/metadata.py", "subprocess.py", "signal.py"),
    *("multiprocessing/__init__.py", "multiprocessing/resource_tracker.py", "sitecustomize.py", "usercustomize.py"),
    *("torch.py", "numpy.py", "transformers/__init__.py", "safetensors/__init__.py", "datasets.py", "typer.py"),
    *(
        "rich/__init__.py",
        "pydantic.py",
        "yaml.py",
        "gguf.py",
        "peft.py",
        "accelerate.py",
        "deepspeed.py",
        "lm_eval.py",
    ),
)
WRITES = "import os\nopen({log!r}, 'a').write({name!r} + '\\n')\n"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A model folder with such modules in it; each writes its name into `imported` beside the folder."""
    folder = tmp_path / "download"
    folder.mkdir()
    for path in embedded("fable-2m").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for name in MODULES:
        write(folder, name)
    return folder


def write(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(WRITES.format(log=str(folder.parent / "imported"), name=name))


def imported(folder: Path) -> list[str]:
    log = folder.parent / "imported"
    return log.read_text().split() if log.exists() else []


def call(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *words], cwd=folder, env=given, capture_output=True, text=True)


# Speed is timed in two turns of two steps; what is imported for that is imported as the command line imports it.
BRIEF = """
from recover.base.safe_path import leave_working_folder
leave_working_folder()
from recover.measure import speed
speed.WARM_SECONDS, speed.take_turns.__kwdefaults__ = 0.0, {"least": 2, "most": 2, "seconds": 0.0}
timed = speed.compare_speed
speed.compare_speed = lambda *models, **_: timed(*models, batch_size=2, prompt_length=16, steps=2)
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    """What pip installs as `recover`."""
    path = tmp_path / "bin" / "recover"
    path.parent.mkdir()
    path.write_text(f"import sys\nfrom recover.cli import main\n{BRIEF}sys.exit(main())\n")
    return str(path)


def test_the_modules_do_write_when_they_are_imported(hostile: Path) -> None:
    assert call(hostile, "-c", "import argparse, json").returncode == 0
    assert imported(hostile) == ["argparse.py", "json/__init__.py"]


def test_a_whole_run_imports_nothing_from_the_folder_it_is_given_in(hostile: Path, script: str, tmp_path: Path) -> None:
    for name in ("recover.py", "runpy.py"):
        write(hostile, name)
    less = (
        *("train.epochs=1", "train.tokens=100", "train.data.0.batch_size=4", "prune={kind: depth, blocks: [3]}"),
        *("probe.sublayers=false", "probe.samples=1", "probe.steps=2", "measure.limit=1", "measure.max_new_tokens=4"),
    )
    done = call(
        hostile, script, "run", str(QUICKSTART), "--runs", str(tmp_path / "runs"), *SMALL, *less, "model.source=."
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "runs" / "quickstart" / "verify.json").read_text())["ok"]
    assert imported(hostile) == []


@pytest.mark.parametrize("path", [str(ROOT), f"{ROOT}{os.pathsep}", f"{os.pathsep}{ROOT}"])
def test_python_m_recover_leaves_the_folder_first_of_all(hostile: Path, path: str) -> None:
    """What it imports after that is what the whole run above imports; by `python -m`, `plan` in the slow tests."""
    if path != str(ROOT):  # an empty entry means the working folder, and Python itself looks for these two there
        for name in ("sitecustomize.py", "usercustomize.py"):
            (hostile / name).unlink()
    done = call(hostile, "-m", "recover", "run", "--help", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert imported(hostile) == []


@pytest.mark.slow
def test_python_m_recover_plans_in_the_folder(hostile: Path, tmp_path: Path) -> None:
    job = ["plan", str(QUICKSTART), "--untimed", "--runs", str(tmp_path / "runs"), *SMALL, "model.source=."]
    done = call(hostile, "-m", "recover", *job)
    assert done.returncode == 0, done.stderr[-3000:]
    assert imported(hostile) == []


def test_a_checkout_that_is_not_installed_works_from_its_folder_and_verifies() -> None:
    environment = {"PYTHONPATH": ""}
    done = call(ROOT, "-m", "recover", "--help", **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    code = "import sys; from recover.base.safe_path import leave_working_folder as f; f(); print(sys.path[-1])"
    done = call(ROOT, "-c", code, **environment)
    assert done.stdout.strip() == str(ROOT), done.stderr


def test_processes_started_later_do_not_look_there_either(hostile: Path) -> None:
    code = (
        "from recover.base.safe_path import leave_working_folder as f; f()\n"
        "import multiprocessing as m, subprocess, sys\n"
        "context = m.get_context('spawn')\n"
        "lock = context.Lock()\n"  # starts multiprocessing's resource tracker
        "subprocess.run([sys.executable, '-c', 'import argparse, numpy'], check=True)\n"
    )
    started = hostile.parent / "start.py"
    started.write_text(code)
    done = call(hostile, str(started))
    assert done.returncode == 0, done.stderr
    assert imported(hostile) == []


def test_the_environment_of_a_child_names_no_working_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for given in ("", ":", ".", "./lib:.:"):
        monkeypatch.setenv("PYTHONPATH", given)
        assert safe_path.child_environment()["PYTHONPATH"] == str(ROOT)
    monkeypatch.setenv("PYTHONPATH", f":/opt/lib:{ROOT}")
    assert safe_path.child_environment()["PYTHONPATH"] == f"/opt/lib:{ROOT}"


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["cpu", "cpu_zero2"])
def test_launched_processes_do_not_look_there(hostile: Path, tmp_path: Path, launch: str) -> None:
    for name in ("sitecustomize.py", "usercustomize.py"):  # Python looks for them where accelerate points PYTHONPATH to
        (hostile / name).unlink()
    launcher = ["accelerate.commands.launch", "--config_file", str(ROOT / "launch" / f"{launch}.yaml")]
    job = ["-m", "recover", "plan", str(QUICKSTART), "--runs", str(tmp_path / "runs"), *SMALL, "model.source=."]
    done = call(hostile, "-P", "-m", *launcher, "--main_process_port", "0", *job)
    assert imported(hostile) == [], done.stderr[-3000:]
    assert done.returncode == 0 or launch != "cpu", done.stderr[-3000:]  # the other names its JSON from the checkout


def test_what_accelerate_adds_is_dropped_and_what_a_user_names_is_kept(hostile: Path) -> None:
    code = "from recover.base.safe_path import leave_working_folder as f; f(); import argparse"
    started = hostile.parent / "start.py"
    started.write_text(code)
    added = os.pathsep.join([str(ROOT), str(hostile)])
    for name in ("sitecustomize.py", "usercustomize.py"):
        (hostile / name).unlink()
    assert call(hostile, str(started), PYTHONPATH=added, ACCELERATE_MIXED_PRECISION="no").returncode == 0
    assert imported(hostile) == []
    assert call(hostile, str(started), PYTHONPATH=added).returncode == 0
    assert imported(hostile) == ["argparse.py"]
