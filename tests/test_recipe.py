"""Recipes: everything a user can write is either a recipe or one RecipeError that names the field."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recover.base.errors import RecipeError
from recover.config import yaml_values
from recover.config.recipe import Depth, Recipe, dump_recipe, embedded, load_recipe, local_path, parse_recipe

SMALL: dict[str, Any] = {
    "name": "small",
    "model": {"source": "org/model"},
    "prune": {"kind": "depth", "count": 2, "calibration": {"data": "org/text"}},
    "train": {"data": [{"kind": "dense", "prompts": "embedded:prompts"}]},
    "measure": {"tasks": ["embedded:sums"]},
}


def write(folder: Path, tree: Any = SMALL, name: str = "my.yaml") -> Path:
    path = folder / name
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


def problem(tree: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(tree, "my.yaml")
    return str(caught.value)


def changed(**leaves: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(SMALL)), **leaves}


def test_defaults_are_filled_in(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    assert recipe.seed == 0 and recipe.train.loss.kl == 1.0 and isinstance(recipe.prune, Depth)


# What a user does wrong -> what the message says.
# ruff: noqa: E501
MESSAGES: list[tuple[dict[str, Any], str]] = [
    (changed(prune={"kind": "wanda", "sparsty": 0.5, "calibration": {"data": "x"}}), "my.yaml: prune.sparsty: unknown field. Did you mean 'sparsity'?"),
    (changed(lr=1e-3), "my.yaml: lr: unknown field. Did you mean 'train.lr'?"),
    (changed(zzz=1), "my.yaml: zzz: unknown field. Expected one of name, seed, model"),
    (changed(prune={"kind": "dept", "count": 1}), "my.yaml: prune: unknown kind \"dept\". Did you mean 'depth'?"),
    (changed(prune={"count": 1}), "my.yaml: prune: 'kind' is missing, expected one of depth, magnitude, wanda"),
    (changed(prune={"kind": "depth"}), "my.yaml: prune: give either 'count'"),
    (changed(prune={"kind": "magnitude"}), "my.yaml: prune: 'sparsity' is needed"),
    (changed(prune={"kind": "magnitude", "sparsity": 1.5}), "my.yaml: prune.sparsity: found 1.5: it should be less than 1"),
    (changed(model={"source": "x", "dtype": "bf16"}), "my.yaml: model.dtype: found \"bf16\". Did you mean 'bfloat16'?"),
    (changed(model={}), "my.yaml: model.source: is missing"),
    (changed(model={"source": "x", "revision": 1234}), "model.revision: found 1234: it should be a valid string; put it in quotes"),
    (changed(model=3), "my.yaml: model: found 3: expected fields"),
    (changed(measure={"tasks": []}), "my.yaml: measure.tasks: found []: expected at least 1"),
    (changed(measure={"tasks": ["a"], "sampling": {"temp": 1}}), "measure.sampling.temp: unknown field. Did you mean 'temperature'?"),
    (changed(probe={"temperatures": [1.0, 0.0]}), "my.yaml: probe.temperatures: temperatures must be greater than 0"),
    (changed(probe={"samples": True}), "my.yaml: probe.samples: found \"true\""),
    (changed(train={"data": [{"kind": "dense", "prompts": "p", "share": math.nan}]}), "train.data.0.share: found NaN"),
    (changed(train={"data": [{"kind": "given", "source": "p", "columns": {"txt": "a"}}]}), "train.data.0.columns.txt: found \"txt\". Did you mean 'text'?"),
    (changed(train={**SMALL["train"], "lr": math.inf}), "my.yaml: train.lr: found Infinity"),
    (changed(train={**SMALL["train"], "loss": {"kl": 0}}), "my.yaml: train.loss: all loss weights are 0"),
    (changed(train={**SMALL["train"], "loss": {"kl": 0, "variance": 1}}), "variance alone is blind"),
    (changed(train={**SMALL["train"], "loss": {"variance_until": 0.5}}), "train.loss: 'variance_until' says when 'variance' ends, which is 0"),
    (changed(train={**SMALL["train"], "loss": {"variance": 1, "variance_until": 0}}), "train.loss.variance_until: found 0"),
    (changed(train={**SMALL["train"], "average": 0.5, "epochs": 3}), "my.yaml: train: average: 0.5 of all steps is more than one of 3 epochs has: give at most 0.333"),
    (changed(train={**SMALL["train"], "average": 0}), "my.yaml: train.average: found 0"),
    (changed(name="../elsewhere"), "my.yaml: name: found \"../elsewhere\""),
]  # fmt: skip


@pytest.mark.parametrize(("tree", "message"), MESSAGES, ids=[message[:50] for _, message in MESSAGES])
def test_message(tree: dict[str, Any], message: str) -> None:
    assert message in problem(tree)


def test_every_problem_is_listed_at_once() -> None:
    lines = problem(changed(lr=1, name="", model={"sorce": "x"})).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["name", "model.source", "model.sorce", "lr"]


def test_items_that_are_wrong_are_not_also_counted_as_absent() -> None:
    assert "at least" not in problem(changed(train={"data": [{"kind": "dens"}]}))


FILES = [
    ("", "my.yaml: model: is missing"),
    ("- 1", "my.yaml: expected fields"),
    ("name: [", "my.yaml:1:8: expected the node content"),
    ("name: a\nname: b", "my.yaml:1:1: the key 'name' occurs twice"),
    ("1: a", "my.yaml:1:1: the key 1 is not text"),
    ("name: !!python/object/apply:os.system [x]", "my.yaml:1:7: could not determine a constructor"),
    ("name: \0", "my.yaml: not YAML"),
    ("[" * 10_000, "my.yaml"),
]


@pytest.mark.parametrize(("text", "message"), FILES, ids=[message for _, message in FILES])
def test_file_that_is_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=r"my\.yaml") as caught:
        load_recipe(write(tmp_path, text))
    assert message in str(caught.value)


def test_missing_file_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(RecipeError, match=r"mi.yaml: No such file or directory. Did you mean '.*my.yaml'"):
        load_recipe(tmp_path / "mi.yaml")
    with pytest.raises(
        RecipeError, match=r"far\.yaml: No such file or directory; `recover init MODEL` writes a recipe"
    ):
        load_recipe(tmp_path / "far.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(RecipeError, match=r"bad\.yaml: not UTF-8: invalid start byte at byte 6"):
        load_recipe(tmp_path / "bad.yaml")
    with pytest.raises(RecipeError, match="a folder, expected a YAML file"):
        load_recipe(tmp_path)


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_resolved_recipe_is_read_back_equal(tmp_path: Path, pattern: str) -> None:
    tree = changed(prune={"kind": "wanda", "pattern": pattern, "calibration": {"data": "c.txt"}})
    recipe = load_recipe(write(tmp_path, tree), ["train.lr=1e-5", "probe.temperatures=[0.5, 2]"])
    (tmp_path / "elsewhere").mkdir()
    again = load_recipe(write(tmp_path / "elsewhere", dump_recipe(recipe)))
    assert again == recipe


def test_overrides(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path),
        [
            "train.lr=1e-3",
            "prune={kind: depth, blocks: [2, 3]}",
            "train.data.0.share=2",
            "train.loss.kl=0.5",
            "seed = 3",
        ],
    )
    assert recipe.train.lr == 1e-3 and recipe.prune.blocks == (2, 3) and recipe.seed == 3  # type: ignore[union-attr]
    assert recipe.train.data[0].share == 2 and recipe.train.loss.kl == 0.5


OVERRIDES = [
    ("prune.cuont=3", "override 'prune.cuont=3': prune.cuont: unknown field. Did you mean 'count'?"),
    ("train.lr=-1", "override 'train.lr=-1': train.lr: found -1: it should be greater than 0"),
    ("train.lr=fast", "override 'train.lr=fast': train.lr: found \"fast\""),
    ("prune.count", "override 'prune.count': expected KEY=VALUE"),
    ("=3", "override '=3': expected KEY=VALUE"),
    ("a..b=3", "expected KEY=VALUE"),
    ("train.data.1.share=2", "train.data is a list of 1: expected an index from 0 to 0, found '1'"),
    ("train.data.x=2", "expected an index from 0 to 0, found 'x'"),
    ("name.x=2", "name is 'small' and has no field 'x'"),
    ("prune={", "override 'prune={':1:2:"),
    (
        "prune.calibration={data: c.txt, sampels: 3}",
        "prune.calibration.sampels: unknown field. Did you mean 'samples'?",
    ),
]


@pytest.mark.parametrize(("override", "message"), OVERRIDES, ids=[override for override, _ in OVERRIDES])
def test_override_that_is_wrong(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path), [override])
    assert message in str(caught.value)


def test_files_are_found_from_the_recipe_and_in_overrides_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes, here = tmp_path / "recipes", tmp_path / "here"
    recipes.mkdir()
    here.mkdir()
    (recipes / "model").mkdir()
    monkeypatch.chdir(here)
    tree = changed(
        model={"source": "model", "tokenizer": "org/tokenizer"},
        prune={"kind": "wanda", "sparsity": 0.5, "calibration": {"data": "../data/c.txt"}},
        train={"data": [{"kind": "given", "source": "org/set"}, {"kind": "dense", "prompts": "p.jsonl"}]},
        measure={"tasks": ["embedded:sums", "task.yaml"]},
    )
    recipe = load_recipe(write(recipes, tree), ["train.data.1.prompts=q.jsonl"])
    assert recipe.model.source == str(recipes / "model") and recipe.model.tokenizer == "org/tokenizer"
    assert recipe.prune.calibration.data == str(tmp_path / "data" / "c.txt")  # type: ignore[union-attr]
    given_text, dense_text = recipe.train.data
    assert given_text.source == "org/set" and dense_text.prompts == str(here / "q.jsonl")  # type: ignore[union-attr]
    assert recipe.measure.tasks == ("embedded:sums", str(recipes / "task.yaml"))


def test_a_source_lies_where_it_says_or_in_the_package() -> None:
    assert local_path("embedded:fable-2m") == embedded("fable-2m") and (embedded("fable-2m") / "config.json").is_file()
    assert local_path("some/file.jsonl") == Path("some/file.jsonl")


def test_what_is_not_embedded_is_refused() -> None:
    for name in ("nothing-of-this-name", "../recipe.py", "/etc/passwd", ""):
        with pytest.raises(RecipeError, match=r"not shipped with the package\. There are"):
            embedded(name)


# Everything a recipe can be broken into: any field of it replaced, removed or joined by any value.
names = st.sampled_from(
    [
        "name",
        "seed",
        "model",
        "prune",
        "train",
        "data",
        "kind",
        "count",
        "blocks",
        "calibration",
        "lr",
        "tasks",
        "loss",
        "kl",
        "share",
    ]
)
numbers = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 1.5, 10**400, math.nan, math.inf])
junk = st.recursive(
    st.none()
    | st.booleans()
    | numbers
    | st.text(max_size=8)
    | st.sampled_from(["depth", "dense", "2:4", "\ud800", "\0"]),
    lambda child: st.lists(child, max_size=3) | st.dictionaries(names | st.text(max_size=5), child, max_size=4),
    max_leaves=8,
)


trees = st.dictionaries(names, st.none() | st.booleans() | st.floats() | st.lists(st.text(max_size=5), max_size=3))


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


def put(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = put(copy[path[0]], path[1:], value)
    return copy


FULL = parse_recipe(SMALL, "full").model_dump(mode="json")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(places(FULL)), st.none() | names | st.text(max_size=5), junk), min_size=1, max_size=3
    )
)
def test_any_mapping_is_a_recipe_or_a_recipe_error(changes: list[tuple[tuple[Any, ...], str | None, Any]]) -> None:
    tree: Any = FULL
    for path, extra, value in changes:
        if path in places(tree):
            old = tree
            for key in path:
                old = old[key]
            tree = put(tree, path, value if extra is None or not isinstance(old, dict) else {**old, extra: value})
    outcome: Recipe | str
    try:
        outcome = parse_recipe(tree, "fuzzed")
    except RecipeError as error:
        outcome = str(error)
        assert outcome.startswith("fuzzed: ")
        outcome.encode()  # a message that cannot be printed is a traceback
    assert isinstance(outcome, str | Recipe)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60) | trees.map(yaml_values.dump), overrides=st.lists(st.text(max_size=20), max_size=2))
@example("a: *b", [])
@example("&a [*a]", [])
@example("a: &b {c: *b}", [])
@example("? {a: 1}\n: 2", [])
@example("<<: 3", [])
@example("a: !!binary 'x'", [])
@example("a: 1" + "0" * 5000, [])
def test_any_text_is_a_recipe_or_a_recipe_error(
    tmp_path_factory: pytest.TempPathFactory, text: str, overrides: list[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(RecipeError):
        load_recipe(path, overrides)


def test_the_reference_page_is_of_these_fields(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "dev"))
    import recipe_reference

    assert recipe_reference.page() == recipe_reference.PAGE.read_text(encoding="utf-8")


QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
AUTO_LINES = ("train.lr=auto", "train.lora={rank: auto, alpha: auto}", "train.tokens=auto", "train.warmup=auto")


def test_auto_is_read_and_written_as_it_stands_and_a_number_over_it_wins():
    recipe = load_recipe(QUICKSTART, AUTO_LINES)
    assert recipe.train.auto == ("tokens", "lr", "warmup", "lora.rank", "lora.alpha")
    text = dump_recipe(recipe)
    assert "lr: auto" in text and "rank: auto" in text and "warmup: auto" in text
    assert parse_recipe(yaml.safe_load(text), "dumped") == recipe
    assert load_recipe(QUICKSTART, [*AUTO_LINES, "train.lr=1e-3"]).train.lr == 1e-3
    assert "lr" not in load_recipe(QUICKSTART, [*AUTO_LINES, "train.lr=1e-3"]).train.auto
    assert load_recipe(QUICKSTART).train.auto == ()


@pytest.mark.parametrize("override", ["train.epochs=auto", "train.lora.rank=automatic", "train.lora=auto"])
def test_auto_is_no_value_of_other_fields(override):
    with pytest.raises(RecipeError, match=override.partition("=")[0]):
        load_recipe(QUICKSTART, [override])
