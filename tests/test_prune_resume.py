"""A pruning that is killed on the way goes on where it was, and ends in the bits of one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from small_run import QUICKSTART, SMALL
from tiny import ids, tiny

from recover.base import journal as journals
from recover.base.artifacts import append_jsonl, read_jsonl
from recover.base.journal import Entry, Journal
from recover.config.recipe import Prune, load_recipe
from recover.models.plan import Plan, Pruned, load_plan
from recover.models.twin import Twin
from recover.prune import registry
from recover.prune.depth import search
from recover.run import stages
from recover.run.context import RunContext
from recover.run.directory import RunDirectory
from recover.run.stage_work import _pruned_from

CALIBRATION = {"data": "given", "samples": 4, "length": 24, "batch_size": 2}
FROM = {"prune": {"sparsity": 0.5}, "calibration": "of one text"}

# recipe -> the parts that it is made in
KINDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "wanda": ({"kind": "wanda", "sparsity": 0.5}, [f"block {n}" for n in range(4)]),
    "wanda owl": (
        {"kind": "wanda", "sparsity": 0.4, "allocation": "owl"},
        ["allocation", *(f"block {n}" for n in range(4))],
    ),
    "wanda kl": (
        {"kind": "wanda", "sparsity": 0.5, "allocation": "kl"},
        [*(f"KL of block {n} alone" for n in range(4)), "allocation", *(f"block {n}" for n in range(4))],
    ),
    "wanda 2:4": ({"kind": "wanda", "pattern": "2:4"}, [f"block {n}" for n in range(4)]),
    "sparsegpt": ({"kind": "sparsegpt", "sparsity": 0.5}, [f"block {n}" for n in range(4)]),
    "sparsegpt 2:4": ({"kind": "sparsegpt", "pattern": "2:4"}, [f"block {n}" for n in range(4)]),
    "depth": ({"kind": "depth", "count": 2}, ["round 1", "round 2"]),
    "depth, swap": (
        {"kind": "depth", "count": 2, "swap": True},
        ["round 1", "round 2", "exchange 1", "exchange 2"],
    ),
    "depth, beam": (
        {"kind": "depth", "count": 2, "beam": 2},
        ["round 1", "round 2", "round 2, set 2"],
    ),
    "depth, few candidates": ({"kind": "depth", "unit": "pair", "count": 2}, ["round 0", "round 1", "round 2"]),
}


class Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch):
    monkeypatch.setattr(search, "CANDIDATES", 4)


def prune(recipe: dict[str, Any], folder: Path | None, made_from: Any = FROM, text: int = 3) -> Pruned:
    cfg: Any = TypeAdapter(Prune).validate_python({"calibration": CALIBRATION, **recipe})
    twin = Twin(tiny(num_hidden_layers=4), Plan.none(4))
    batches: Any = list(ids(4, 24, seed=text).split(2))
    return registry.prune(twin, cfg, batches, Journal(folder, made_from))


def same(one: Pruned, other: Pruned) -> bool:
    def equal(a, b):
        return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    return one.plan == other.plan and equal(one.masks, other.masks) and equal(one.weights, other.weights)


def killed(monkeypatch, recipe: dict[str, Any], folder: Path, after: int) -> None:
    """Prune until so many parts are on disk; then the process dies, its next part half on disk."""
    keep = Journal.keep

    def until(self, name: str, entry: Entry) -> None:
        if len(self.lines) == after:
            if entry.tensors:
                self._file(after).write_bytes(b"half a file")
            raise Killed
        keep(self, name, entry)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Journal, "keep", until)
        prune(recipe, folder)


def decided(monkeypatch) -> list[str]:
    """Names of the parts that are decided from now on."""
    names: list[str] = []
    keep = Journal.keep

    def noted(self, name: str, entry: Entry) -> None:
        names.append(name)
        keep(self, name, entry)

    monkeypatch.setattr(Journal, "keep", noted)
    return names


@pytest.mark.parametrize("kind", KINDS)
def test_killed_between_any_two_parts_it_goes_on_to_the_same_bits(kind, tmp_path, monkeypatch, capsys):
    recipe, names = KINDS[kind]
    if kind in ("depth", "depth, swap", "depth, beam"):
        monkeypatch.setattr(search, "CANDIDATES", 40)
    expected = prune(recipe, None)
    assert same(prune(recipe, tmp_path / "whole"), expected)
    assert [line["name"] for line in read_jsonl(tmp_path / "whole" / journals.LINES)[1:]] == names
    for after in range(len(names)):
        folder = tmp_path / str(after)
        killed(monkeypatch, recipe, folder, after)
        capsys.readouterr()
        with monkeypatch.context() as patch:
            again = decided(patch)
            assert same(prune(recipe, folder), expected)
        assert again == names[after:]
        said = capsys.readouterr().out
        assert ("going on after" in said) == (after > 0)
        assert after == 0 or f"going on after {names[after - 1]}: {after} parts are done" in said


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def other_value(folder: Path) -> None:
    text = (folder / journals.LINES).read_text()
    (folder / journals.LINES).write_text(text.replace('"chosen": false', '"chosen": true', 1))


DAMAGES = [
    ("sparsegpt", lambda folder: cut(folder / "part-1.safetensors"), 1, "part-1.safetensors is damaged"),
    ("wanda", lambda folder: flip(folder / "part-2.safetensors"), 2, "part-2.safetensors is damaged"),
    ("wanda", lambda folder: (folder / "part-0.safetensors").unlink(), 0, "part-0.safetensors is missing"),
    ("wanda", lambda folder: cut(folder / journals.LINES), 2, ""),  # as a crash while it was written leaves it
    ("depth, few candidates", other_value, 0, "line 2 of parts.jsonl is damaged"),
    ("wanda", lambda folder: (folder / journals.LINES).write_bytes(b"{nonsense\n"), 0, "corrupt JSON"),
    ("wanda", lambda folder: (folder / journals.LINES).write_bytes(b""), 0, ""),
    ("wanda", lambda folder: append_jsonl(folder / journals.LINES, 3), 3, "line 5 of parts.jsonl is damaged"),
]


@pytest.mark.parametrize(("kind", "damage", "left", "said"), DAMAGES)
def test_a_damaged_part_and_those_behind_it_are_done_again(kind, damage, left, said, tmp_path, monkeypatch, capsys):
    recipe, names = KINDS[kind]
    killed(monkeypatch, recipe, tmp_path, min(3, len(names) - 1))
    damage(tmp_path)
    capsys.readouterr()
    again = decided(monkeypatch)
    assert same(prune(recipe, tmp_path), prune(recipe, None))
    assert again[: len(names) - left] == names[left:]  # the rest is the reference, which keeps nothing
    warned = capsys.readouterr().err
    assert said in warned and ("warning" in warned) == bool(said)
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    assert files == ({f"part-{n}.safetensors" for n in range(4)} if "depth" not in kind else set())


def test_parts_of_another_recipe_are_refused_by_the_field(tmp_path, monkeypatch, capsys):
    killed(monkeypatch, KINDS["wanda"][0], tmp_path, 3)
    capsys.readouterr()
    other = {**KINDS["wanda"][0], "sparsity": 0.25}
    made_from = {**FROM, "prune": {"sparsity": 0.25}}
    assert same(prune(other, tmp_path, made_from), prune(other, None))
    warned = capsys.readouterr().err
    assert "made from something else (prune.sparsity: 0.5 -> 0.25); all is done again" in warned
    assert read_jsonl(tmp_path / journals.LINES)[0]["made_from"] == made_from


TEXT = "{data: 'embedded:tasks/calibration.jsonl', samples: 2, length: 64}"
OVERRIDES = (f"prune={{kind: sparsegpt, pattern: '2:4', calibration: {TEXT}}}",)


def stage(root: Path, *overrides: str) -> RunDirectory:
    recipe = load_recipe(QUICKSTART, [*SMALL, *OVERRIDES, "measure.limit=1", "measure.max_new_tokens=2", *overrides])
    return stages.run(recipe, root, until="prune")


def test_a_stage_that_is_killed_goes_on_and_leaves_no_part(tmp_path, monkeypatch, capsys):
    keep = Journal.keep

    def until(self, name: str, entry: Entry) -> None:
        if name == "block 5":
            raise Killed
        keep(self, name, entry)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Journal, "keep", until)
        stage(tmp_path / "one")
    folder = tmp_path / "one" / "quickstart" / "prune" / "parts"
    assert len(list(folder.glob("*.safetensors"))) == 5
    capsys.readouterr()
    again = decided(monkeypatch)
    directory = stage(tmp_path / "one")
    assert again == [f"block {n}" for n in range(5, 12)]
    assert "going on after block 4: 5 parts are done" in capsys.readouterr().out
    assert not folder.exists() and directory.done("prune") is not None
    assert same(load_plan(directory.prune), load_plan(stage(tmp_path / "two").prune))


def test_parts_are_made_from_all_that_their_bits_depend_on(tmp_path):
    def made_from(text: int = 1, *overrides: str, weight: float = 0.0) -> dict[str, Any]:
        context = RunContext(load_recipe(QUICKSTART, [*OVERRIDES, *overrides]), RunDirectory(tmp_path))
        twin = Twin(tiny(), Plan.none(6))
        twin.model.model.layers[3].mlp.up_proj.weight.data[0, 0] += weight
        return _pruned_from(context, twin, list(ids(2, 8, seed=text).split(1)))  # type: ignore[arg-type]

    first = made_from()
    assert made_from() == first
    changed = {
        "calibration": made_from(2),
        "weights": made_from(1, weight=1.0),
        "dtype": made_from(1, "model.dtype=bfloat16"),
        "prune": made_from(1, "prune.pattern='4:8'"),
    }
    for field, other in changed.items():
        assert [name for name in first if other[name] != first[name]] == [field]
