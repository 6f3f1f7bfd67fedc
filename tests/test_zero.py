"""What is relied on of DeepSpeed's inside is there, and does what `base/zero.py` says it does."""

import os
import re
import runpy
from pathlib import Path

import faulty
import pytest

from recover.base import zero
from recover.base.errors import TrainingError

pytest.importorskip("deepspeed")
ENGINES = Path(__file__).parent / "zero_engines.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Names of `INTERNALS` that an engine of one process had; the script asserts on the way what they do."""

    def engines():
        for name in [name for name in os.environ if name.startswith("ACCELERATE")]:
            del os.environ[name]
        runpy.run_path(str(ENGINES), run_name="__main__")

    code, output = faulty.run(tmp_path_factory.mktemp("engines") / "run", engines)
    assert code == 0, output[-3000:]
    return [line.removeprefix("has ") for line in output.splitlines() if line.startswith("has ")]


@pytest.mark.parametrize("name", zero.INTERNALS)
def test_deepspeed_still_has_it(found, name):
    assert name in found, f"DeepSpeed has no {name} any more ({zero.INTERNALS[name]}): mend recover/base/zero.py"


def test_no_other_file_knows_deepspeed_from_inside():
    package = Path(zero.__file__).parents[1]
    inside = [name for name in zero.INTERNALS if name not in ("forward_hooks", "backward_hooks")]  # torch has such too
    for path in package.rglob("*.py"):
        words = set(re.findall(r"\w+|import deepspeed|from deepspeed", path.read_text()))
        names = sorted(words & {*inside, "_z3_leaf", "import deepspeed", "from deepspeed"})
        assert not names or path == Path(zero.__file__), f"{path.relative_to(package)} uses {names}: ask base/zero.py"


def test_an_engine_with_hooks_elsewhere_is_named():
    class Strange:
        parameter_offload = object()

    class Engine:
        optimizer = Strange()

        def parameters(self):
            return []

    with pytest.raises(TrainingError, match=r"hooks were not found.*fwd_pre_hook.*zero2"), zero.outside(Engine()):
        pass
