"""What a plan says of time: from a few blocks to all of them, what is timed, and what is said where nothing is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from byte_tokenizer import byte_tokenizer
from tiny import ATTENDS, FAMILIES, ids, only, tiny, tiny_config
from typer.testing import CliRunner

from recover.base import console, dist
from recover.cli import app
from recover.config.recipe import Model, Recipe, TeacherText, load_recipe
from recover.models.load import describe
from recover.run import forecast as forecasts
from recover.run import pace, stages
from recover.run.context import RunContext
from recover.run.directory import RunDirectory
from recover.run.estimate import estimate
from recover.run.forecast import Lengths, forecast
from recover.run.pace import Decoding, NotTimed, Pace, Sample, Span, sample

FAST = 1e15  # FLOP/s: no piece of work is cut down
CHOICE = {"name": "pick", "kind": "choice", "data": "rows.jsonl", "prompt": "{question}"}
GENERATE = {"name": "task", "kind": "generate", "data": "rows.jsonl", "prompt": "{question}"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a model of 12 blocks, whose tokenizer gives a token a letter."""
    folder = tmp_path_factory.mktemp("user")
    tiny("llama", num_hidden_layers=12).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    row = {"question": "q" * 10, "answer": "7", "options": ["a", "b" * 4], "label": 0, "prompt": "p" * 12}
    rows = [{**row, "question": f"{number:010}", "prompt": f"{number:012}"} for number in range(24)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    (folder / "text.jsonl").write_text("".join(f"{json.dumps({'text': 'some words ' * 3})}\n" for _ in range(20)))
    (folder / "task.yaml").write_text(yaml.safe_dump(GENERATE))
    (folder / "pick.yaml").write_text(yaml.safe_dump(CHOICE))
    recipe = {
        "name": "small",
        "model": {"source": "./model"},
        "prune": {"kind": "depth", "count": 3, "calibration": {"data": "./text.jsonl", "samples": 2, "length": 16}},
        "probe": {"steps": 4, "samples": 4},
        "train": {
            "tokens": 800,
            "epochs": 2,
            "batch_size": 4,
            "length": 48,
            "data": [{"kind": "dense", "prompts": "./rows.jsonl", "max_new_tokens": 20, "batch_size": 8}],
        },
        "measure": {"tasks": ["./task.yaml", "./pick.yaml"], "max_new_tokens": 16},
    }
    (folder / "my.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "TURNS", 1)
    monkeypatch.setattr(pace, "PROBED", (2, 2))


@pytest.fixture
def constant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is run: each piece of work takes a second."""
    monkeypatch.setattr(pace.Pace, "_timed", lambda _, works: [1.0] * len(works))


def recipe_of(made: Path, *overrides: str) -> Recipe:
    return load_recipe(made / "my.yaml", overrides)


def found_by(
    made: Path, *overrides: str, rate: float = FAST, runs: str = "runs", left: dict[str, float] | None = None
) -> forecasts.Forecast:
    recipe = recipe_of(made, *overrides)
    context = RunContext(recipe, RunDirectory(made / runs / recipe.name))
    return forecast(context, estimate(recipe, describe(recipe.model), rate), libraries=2.0, left=left)


def seconds_of(found: forecasts.Forecast, what: str) -> float:
    return next(piece["seconds"] for piece in found["pieces"] if what in piece["what"])


def test_seconds_of_all_blocks_come_from_those_of_a_few_of_each_kind():
    """Base 5; ten blocks of 2 seconds, four of 3, and one of 7, of which no other is there to be told apart."""
    chosen = sample([[*range(10)], [10, 11, 12, 13], [14]], most=6)
    assert chosen == Sample((0, 10, 14), ((1, 2, 3), (11, 12, 13)), (9, 3))
    assert chosen.models == [(0, 10, 14), (0, 1, 2, 3, 10, 14), (0, 10, 11, 12, 13, 14)]
    seconds = [5 + 2 + 3 + 7, 5 + 4 * 2 + 3 + 7, 5 + 2 + 4 * 3 + 7]
    whole = chosen.whole(seconds)
    assert whole == Span(5 + 7, 10 * 2 + 4 * 3) and whole.at() == 44.0 and whole.at(0.5) == 28.0


def test_a_noisy_timing_makes_no_block_cost_less_than_nothing():
    chosen = sample([[0, 1, 2, 3]], most=1)
    assert chosen.whole([5.0, 4.0]) == Span(5.0, 0.0)
    assert Span(1.0, 2.0).less(Span(2.0, 0.5)) == Span(0.0, 1.5)


@pytest.mark.parametrize(
    ("ways", "seconds"),
    [
        # Two calls of 4 rows: 10 steps of what a step takes at all, and each text as long as it is.
        ({"refills": False, "shrinks": True}, 2 * (1 + 10 * 0.5) + 8 * 7 * pace.HELD * 0.1),
        # Rows stay to the end.
        ({"refills": False, "shrinks": False}, 2 * (1 + 10 * 0.5) + 8 * 10 * 0.1),
        # One call, rows filled again: as many steps as the tokens need, all rows in each.
        ({"refills": True, "shrinks": True}, 1 + 8 * 7 / 4 * pace.FILLED * (0.5 + 4 * 0.1)),
    ],
)
def test_seconds_of_texts(ways: dict[str, bool], seconds: float):
    decoding = Decoding(Span(0.5), Span(0.1), 1.0, **ways)
    assert decoding.seconds(8, length=7, longest=10, rows=4) == pytest.approx(seconds)
    assert decoding.seconds(0, length=7, longest=10, rows=4) == 0.0


class Ticking:
    """A clock that goes on only when a model works: by its base for each pass, and by a block's for each block."""

    def __init__(self, base: float, block: float, row: float = 0.0, token: float = 0.0) -> None:
        self.now, self.base, self.block, self.row, self.token = 0.0, base, block, row, token

    def __call__(self) -> float:
        return self.now

    def watch(self, twin: Any) -> None:
        twin.base.get_input_embeddings().register_forward_pre_hook(lambda *_: self.passed(self.base))
        for block in twin.blocks:
            block.register_forward_pre_hook(self.ran)

    def passed(self, seconds: float) -> None:
        self.now += seconds

    def ran(self, module: Any, inputs: Any) -> None:
        rows, tokens = inputs[0].shape[:2]
        self.now += self.block + rows * self.row + rows * tokens * self.token


def watched(monkeypatch: pytest.MonkeyPatch, made: Path, clock: Ticking, **given: Any) -> Pace:
    """A Pace of the recipe's model, of which a few blocks are there, by this clock."""
    monkeypatch.setattr(pace, "_clock", clock)
    recipe = recipe_of(made)
    found = Pace(recipe, describe(recipe.model), FAST, masked=False, **({"local": False} | given))
    for few in found.few:
        clock.watch(few.twin)
        fresh = few.fresh
        monkeypatch.setattr(few, "fresh", lambda fresh=fresh: seen(clock, fresh()))
    return found


def seen(clock: Ticking, twin: Any) -> Any:
    clock.watch(twin)
    return twin


def test_a_pass_over_tokens_is_what_the_whole_model_takes(monkeypatch, made):
    found = watched(monkeypatch, made, Ticking(base=3.0, block=0.5))
    span = found.forward(2, 16)
    assert (span.base * 32, span.blocks * 32) == pytest.approx((3.0, 12 * 0.5))


def test_a_step_of_decoding_is_told_apart_from_its_rows(monkeypatch, made):
    found = watched(monkeypatch, made, Ticking(base=3.0, block=0.5, row=0.25))
    decoding = found.decoding(8, 64)
    assert (decoding.fixed.base, decoding.fixed.blocks) == pytest.approx((3.0, 12 * 0.5))
    assert (decoding.row.base, decoding.row.blocks) == pytest.approx((0.0, 12 * 0.25))
    assert decoding.setup == 0.0 and decoding.shrinks and not decoding.refills


def test_a_training_step_runs_both_passes_of_each_block(monkeypatch, made):
    """And the share of the dense pass is said: a third, as backward takes as long as a pass, with what it runs."""
    found = watched(monkeypatch, made, Ticking(base=3.0, block=0.5))
    span, share = found.step(prompt=12, answer=20)
    assert (span.base, span.blocks) == pytest.approx((2 * 3.0, 2 * 12 * 0.5)) and share == 1 / 3


def test_what_would_take_long_is_cut_down_and_counted_up(monkeypatch, made):
    """4 sequences of 32 tokens, of which so slow a machine is given 64 tokens."""
    clock = Ticking(base=0.0, block=0.0, token=0.01)
    monkeypatch.setattr(pace, "STEP_AT_ONCE", 1e-9)
    found = watched(monkeypatch, made, clock)
    span, _ = found.step(prompt=12, answer=20)
    assert span.at() == pytest.approx(2 * 12 * 4 * 32 * 0.01)


def test_rows_of_a_task_are_counted_up_from_a_few(monkeypatch, made):
    found = watched(monkeypatch, made, Ticking(base=0.0, block=0.0, token=0.01))
    recipe = recipe_of(made)
    context = RunContext(recipe, RunDirectory(made / "none" / recipe.name))
    task = next(each for each in context.tasks if each.name == "pick")
    once, twice = (found.scoring(task, context.tokenizer, items).at() for items in (12, 24))
    assert once > 0 and twice == pytest.approx(2 * once, rel=0.01)


@pytest.mark.parametrize("family", only(FAMILIES, ATTENDS))
def test_a_model_of_a_few_blocks_is_made_of_every_family(family: str):
    """Of the blocks' own kinds and sizes; the models share memory, and run."""
    config = tiny_config(family)
    kinds = pace.kinds_of(config)
    assert sorted(block for kind in kinds for block in kind) == [*range(config.num_hidden_layers)]
    chosen = sample(kinds, 1)
    assert len(chosen.blocks) < config.num_hidden_layers
    cfg = Model(source="none", dtype="float32")
    with console.muted():
        largest = pace.random_model(cfg, pace.of_blocks(config, chosen.blocks))
        at = {number: place for place, number in enumerate(chosen.blocks)}
        models = [pace.cut(largest, [at[number] for number in blocks]) for blocks in chosen.models]
    whole = {tuple(value.shape) for value in tiny(family).parameters()}
    for blocks, model in zip(chosen.models, models, strict=True):
        assert model.config.num_hidden_layers == len(blocks)
        assert {tuple(value.shape) for value in model.parameters()} <= whole
        tables: list[Any] = [each.get_input_embeddings() for each in (model, largest)]
        assert len({table.weight.data_ptr() for table in tables}) == 1
        with torch.no_grad():
            assert model(input_ids=ids()).logits.isfinite().all()


def test_timing_takes_less_memory_than_the_model(made):
    recipe = recipe_of(made)
    model = describe(recipe.model)
    found = Pace(recipe, model, FAST, masked=False, local=False)
    assert found.parameters < model.parameters / 2
    assert sum(value.numel() for value in found.few[-1].model.parameters()) <= found.parameters


def test_a_small_model_is_timed_whole(made):
    recipe = recipe_of(made)
    model = describe(recipe.model)
    found = Pace(recipe, model, FAST, masked=False, local=True)
    assert found.whole is not None and found.parameters == model.parameters
    assert [few.model.config.num_hidden_layers for few in found.few] == [1, 12]


@pytest.mark.parametrize(
    ("overrides", "rate", "said"),
    [
        (("model.offload=cpu",), FAST, "model.offload"),
        ((), 1.0, "64 tokens through a few blocks take"),
    ],
    ids=["offload", "slow"],
)
def test_what_cannot_be_timed_is_a_floor_and_says_why(made, overrides, rate, said):
    found = found_by(made, *overrides, rate=rate)
    assert any(note.startswith("not timed") and said in note for note in found["notes"])
    steps = next(piece for piece in found["pieces"] if "steps of 4" in piece["what"])
    expected = estimate(recipe_of(made, *overrides), describe(recipe_of(made).model), rate)["training_seconds"]
    assert steps["how"] == "floor" and steps["seconds"] == expected
    assert all(piece["how"] != "measured" for piece in found["pieces"])
    assert (
        forecasts.lines(found)[-1][2].startswith("at least ") and forecasts.lines(found)[-1][3] == "0% of it measured"
    )
    assert {piece["how"] for piece in found["pieces"] if "answers" in piece["what"]} == {"not counted"}


def test_a_fault_in_timing_ends_no_plan(monkeypatch, made, constant):
    def fails(*_: Any) -> None:
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(pace.Pace, "step", fails)
    found = found_by(made)
    steps = next(piece for piece in found["pieces"] if "steps of 4" in piece["what"])
    assert steps["how"] == "floor" and any("RuntimeError: no kernel for this" in note for note in found["notes"])
    assert any(piece["how"] == "measured" for piece in found["pieces"])


def test_a_stage_after_the_other_with_what_it_does(made, quick):
    random = torch.random.get_rng_state()
    found = found_by(made)
    assert torch.equal(torch.random.get_rng_state(), random)
    order = list(dict.fromkeys(piece["stage"] for piece in found["pieces"]))
    assert order == ["dense", "prune", "before", "train", "after", "export"]
    hows = {piece["stage"]: piece["how"] for piece in found["pieces"]}
    assert hows == {stage: "floor" if stage == "export" else "measured" for stage in order}
    assert all(piece["seconds"] > 0 for piece in found["pieces"])
    rows = forecasts.lines(found)
    total = sum(piece["seconds"] for piece in found["pieces"])
    assert rows[-1][0] == "all" and rows[-1][2] == console.duration(total)
    unknown = {"stage": "after", "what": "a probe", "seconds": 0.0, "how": "not counted"}
    rows = forecasts.lines({**found, "pieces": [*found["pieces"], unknown]})
    assert rows[-1][2] == f"at least {console.duration(total)}" and rows[-2][2:] == ["–", "not counted"]


def test_epochs_and_accumulation_are_counted(monkeypatch, made, constant):
    """A step of half the rows at once takes two micro-batches; more epochs measure more often."""
    monkeypatch.setattr(pace.Pace, "step", lambda self, prompt, answer: (Span(1.0, 0.0), 0.0))
    monkeypatch.setattr(forecasts._Forecaster, "_lengths", lambda *_, **__: Lengths(12, 10, 20))

    def seconds(what: str, *overrides: str) -> float:
        return seconds_of(found_by(made, "train.length=64", *overrides), what)

    assert seconds("steps of 4") == 20.0  # 800 tokens of texts of 10, 4 a step
    assert seconds("steps of 4", "train.micro_batch_size=2") == 40.0
    assert seconds("trials of rates", "train.lr=auto") == pytest.approx(1.05 * 20)
    assert seconds("measuring after the epoch", "train.epochs=1") > 0
    two, three, four = (seconds("measuring after each of", f"train.epochs={epochs}") for epochs in (2, 3, 4))
    assert three > two and four - three == pytest.approx(three - two)
    assert 0 < seconds("measuring after the epoch", "train.epochs=1") < two
    assert seconds("1 step of 4", "train.tokens=40") == 1.0


def test_the_first_batch_of_text_is_written_whole(monkeypatch, made, constant):
    monkeypatch.setattr(forecasts._Forecaster, "_lengths", lambda *_, **__: Lengths(12, 10, 20))
    for batch, texts in ((2, 2), (16, 16)):
        data = f"train.data=[{{kind: dense, prompts: {made / 'rows.jsonl'}, batch_size: {batch}, temperature: 1.0}}]"
        found = found_by(made, "train.length=64", "train.tokens=20", data)
        assert seconds_of(found, f"{texts * 10} tokens that the dense model writes") > 0


def test_items_that_are_timed_are_alike_and_as_long_as_the_mean():
    texts = ["x" * size for size in (9, 1, 2, 8, 5, 4, 6, 30, 3, 12)]  # 8 in the mean
    assert pace.of_mean_length([len(text) for text in texts], texts, 3) == [6, 8, 9]
    assert sorted(pace.of_mean_length(texts, texts, 99)) == sorted(texts)
    assert pace.spread([*range(10)], 4) == [0, 2, 5, 7] and pace.spread([1, 2], 4) == [1, 2]


def test_lengths_that_lie_in_the_run_are_taken(monkeypatch, made, constant):
    monkeypatch.setattr(pace.Pace, "length", lambda *_, **__: None)
    guessed = found_by(made)
    assert any("60% of the 16 tokens" in note for note in guessed["notes"])
    folder = made / "again" / "small"
    (folder / "dense").mkdir(parents=True)
    (folder / "train" / "data").mkdir(parents=True)
    (folder / "dense" / "generations.json").write_text(json.dumps({"task": [{"ids": [1] * 4}] * 24}))
    prompts = [[f"{number:012}", [5] * 8] for number in range(10)]
    (folder / "train" / "data" / "dense-0.jsonl").write_text(json.dumps({"chunk": 0, "rows": prompts}) + "\n")
    found = found_by(made, runs="again")
    assert sum("in the run's folder" in note for note in found["notes"]) == 2
    steps = next(piece["what"] for piece in found["pieces"] if "steps of" in piece["what"])
    assert steps.startswith("25 steps of 4")  # 800 tokens of texts of 8, 4 a step
    written = next(piece["what"] for piece in found["pieces"] if "model writes" in piece["what"])
    assert written.startswith(f"{(100 - 10) * 8} tokens")  # 10 of the 100 texts are there
    for answers, text in (([], 3), ({"task": 3}, {"chunk": 0}), ({"task": [{}]}, {"rows": [1]}), ({"task": [3]}, [])):
        (folder / "dense" / "generations.json").write_text(json.dumps(answers))
        (folder / "train" / "data" / "dense-0.jsonl").write_text(json.dumps(text) + "\n")
        assert found_by(made, runs="again") == guessed  # a damaged record is named by the run


def test_a_search_runs_half_the_blocks_of_each_candidate_and_judges_its_output(monkeypatch, made, constant):
    """12 blocks, 3 drops: 11 + 10 + 9 candidates, and dense and the start of each drop whole; 2 x 16 tokens."""
    monkeypatch.setattr(pace.Pace, "forward", lambda *_: Span(0.0, 1.0))
    monkeypatch.setattr(pace.Pace, "judging", lambda _, score: {"kl": 0.25, "perplexity": 0.125}[score])
    for score, judged in (("kl", 0.25), ("perplexity", 0.125)):
        found = found_by(made, f"prune.score={score}")
        assert seconds_of(found, "passes of calibration text") == 32 * ((1 + 3) * 1.0 + 30 * (0.5 + judged))


@pytest.mark.parametrize("score", ["kl", "variance", "perplexity"])
def test_what_judges_a_candidate_is_what_the_search_calls(monkeypatch, made, score):
    calls: list[str] = []
    for name in ("row_sum", "nll_sum"):
        real = getattr(pace, name)
        monkeypatch.setattr(pace, name, lambda *given, real=real, name=name: (calls.append(name), real(*given))[1])
    recipe = recipe_of(made)
    found = Pace(recipe, describe(recipe.model), FAST, masked=False, local=False)
    assert found.judging(score) > 0 and {*calls} == {"nll_sum" if score == "perplexity" else "row_sum"}


def test_a_small_model_is_pruned_as_the_run_does_it_to_see_how_long_its_texts_are(monkeypatch, made, constant):
    seen: list[tuple[int, ...]] = []

    def length(*_: Any, twin: Any = None, **__: Any) -> tuple[float, float]:
        seen.append(() if twin is None else twin.closed_blocks)
        return (8.0, 12.0) if twin is None else (3.0, 4.0)

    monkeypatch.setattr(pace.Pace, "length", length)
    monkeypatch.setattr(forecasts, "PRUNES", float("inf"))
    found = found_by(made)
    assert "task task, pruned: texts of 3 tokens, as the pruned model just wrote a few" in found["notes"]
    run = stages.run(recipe_of(made), made / "pruned", until="prune")
    plan = json.loads((run.prune / "plan.json").read_text())
    assert {*seen} == {(), tuple(plan["dropped"])}
    # Of a run that is pruned already its plan is taken.
    seen.clear()
    monkeypatch.setattr(forecasts.registry, "prune", None)
    found_by(made, runs="pruned", left={"prune": 0.0})
    assert {*seen} == {(), tuple(plan["dropped"])}
    # A search that takes long is not made: then nothing is known of these texts.
    monkeypatch.setattr(forecasts, "PRUNES", 0.0)
    guessed = found_by(made)
    assert "task task, pruned: as long as the dense model's, a guess" in guessed["notes"]


def test_the_pruned_models_answers_that_lie_in_the_run_are_taken(monkeypatch, made, constant):
    monkeypatch.setattr(pace.Pace, "length", lambda *_, **__: None)
    folder = made / "measured" / "small"
    for stage, tokens in (("dense", 12), ("before", 3)):
        (folder / stage).mkdir(parents=True)
        (folder / stage / "generations.json").write_text(json.dumps({"task": [{"ids": [1] * tokens}] * 24}))
    kept = found_by(made, runs="measured", left={"prune": 0.0, "dense": 0.0})
    again = found_by(made, runs="measured", left={"dense": 0.0})
    assert "task task, pruned: answers as long as those that lie in the run's folder" in kept["notes"]
    assert "task task, pruned: as long as the dense model's, a guess" in again["notes"]  # it may be pruned otherwise

    def before(found: forecasts.Forecast) -> float:
        return next(
            each["seconds"] for each in found["pieces"] if each["stage"] == "before" and "answers" in each["what"]
        )

    assert before(kept) < before(again)


def test_a_runs_texts_are_read_once_for_all_sources(monkeypatch, made, constant):
    monkeypatch.setattr(pace.Pace, "length", lambda *_, **__: (8.0, 12.0))
    data = made / "once" / "small" / "train" / "data"
    data.mkdir(parents=True)
    for number in range(3):
        rows = [[f"{number:012}", [5] * 8]] * 4
        (data / f"dense-{number}.jsonl").write_text(json.dumps({"chunk": 0, "rows": rows}) + "\n")
    read: list[str] = []
    real = forecasts.read_jsonl
    monkeypatch.setattr(forecasts, "read_jsonl", lambda path: (read.append(path.name), real(path))[1])
    source = "{kind: dense, prompts: ./rows.jsonl, max_new_tokens: 20, batch_size: 8}"
    more = ", ".join([source] * 3).replace("./rows.jsonl", str(made / "rows.jsonl"))
    found = found_by(made, f"train.data=[{more}]", runs="once")
    assert sorted(read) == [f"dense-{number}.jsonl" for number in range(3)]
    assert sum("model writes" in each["what"] for each in found["pieces"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(ATTENDS | {"qwen3_next", "mixtral", "granitemoehybrid", "nemotron_h"}))
def test_every_kind_of_model_is_timed(made, quick, tmp_path, monkeypatch, family):
    """Hybrids and mixtures too: nothing falls back to its floor but what always does."""
    tiny(family).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(pace, "SMALL", 0)
    found = found_by(made, f"model.source={tmp_path / 'model'}", "prune.count=1")
    assert [note for note in found["notes"] if note.startswith("not timed")] == []
    assert {piece["how"] for piece in found["pieces"] if piece["stage"] != "export"} == {"measured"}


TEXT = "calibration: {data: ./text.jsonl, samples: 2, length: 16}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prune", "named"),
    [
        ("{kind: magnitude, sparsity: 0.5}", "block by block"),
        (f"{{kind: wanda, sparsity: 0.5, {TEXT}}}", "block by block"),
        (f"{{kind: sparsegpt, sparsity: 0.5, {TEXT}}}", "block by block"),
        (f"{{kind: width, mlp: 0.34, {TEXT}}}", "block by block"),
        ("{kind: depth, blocks: [2, 3]}", None),
    ],
)
def test_every_way_to_prune_is_timed(made, quick, prune, named):
    lines = (made / "my.yaml").read_text()
    tree = {**yaml.safe_load(lines), "prune": yaml.safe_load(prune)}
    (made / "other.yaml").write_text(yaml.safe_dump(tree))
    recipe = load_recipe(made / "other.yaml", [])
    context = RunContext(recipe, RunDirectory(made / "runs" / recipe.name))
    found = forecast(context, estimate(recipe, describe(recipe.model), FAST), libraries=2.0)
    assert [note for note in found["notes"] if note.startswith("not timed")] == []
    said = [piece["what"] for piece in found["pieces"] if piece["stage"] == "prune"]
    assert len(said) == (named is not None) and all(named in what for what in said)


def test_what_is_done_is_not_counted_and_of_a_longer_training_the_rest_is(made, constant):
    whole = found_by(made)
    rest = found_by(made, left={"dense": 0.0, "prune": 0.0, "train": 0.25})
    assert "dense" in {piece["stage"] for piece in whole["pieces"]}
    assert {piece["stage"] for piece in rest["pieces"]} == {"before", "train", "after", "export"}
    assert seconds_of(rest, "steps of 4") == pytest.approx(seconds_of(whole, "steps of 4") / 4)


@pytest.mark.parametrize(
    ("what", "why", "left"),
    [
        ("kept", "", 0.0),
        ("to do", "", 1.0),
        ("again", "prune.count: 3 -> 4", 1.0),
        ("again", "train.tokens: 3000 -> 4000", 0.25),
        ("again", "train.tokens: 3000 -> 4000; train.epochs: 3 -> 4", 0.25),
        ("again", "train.tokens: 3000 -> 4000; train.lr: 0.1 -> 0.2", 1.0),
        ("again", "train.tokens: 4000 -> 3000", 1.0),
    ],
)
def test_how_much_of_a_stage_is_left(what: str, why: str, left: float):
    assert stages._left(what, why) == left


def test_a_plan_says_the_time_and_writes_nothing(made, constant):
    def there() -> Iterator[tuple[str, int]]:
        yield from ((str(path), path.stat().st_mtime_ns) for path in sorted(made.rglob("*")))

    before = [*there()]
    said = CliRunner().invoke(app, ["plan", str(made / "my.yaml"), "--runs", str(made / "nowhere")])
    assert said.exit_code == 0, said.output
    assert "time on this machine" in said.output and "measured" in said.output and "at least" in said.output
    assert "training time" not in said.output
    assert [*there()] == before


def test_untimed_a_plan_says_a_floor(made, monkeypatch):
    monkeypatch.setattr(pace, "Pace", None)
    arguments = ["plan", str(made / "my.yaml"), "--runs", str(made / "nowhere"), "--untimed"]
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 0, said.output
    assert "training time" in said.output and "time on this machine" not in said.output


def test_as_one_the_main_process_is_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert dist.world_size() == 4
    with dist.as_one():
        assert dist.world_size() == 1 and dist.shard([1, 2]) == [1, 2]
    assert dist.world_size() == 4


def test_muted_nothing_is_printed(capsys):
    with console.muted():
        console.say("a")
        console.warn("b")
        console.table("c", ["d"], [["e"]])
        console.heading("f")
    assert capsys.readouterr() == ("", "")
    console.say("a")
    assert capsys.readouterr().out == "a\n"


def test_a_teachers_file_is_not_timed(made):
    recipe = recipe_of(made)
    found = Pace(recipe, describe(recipe.model), FAST, masked=False, local=False)
    train = recipe.train.model_copy(update={"data": (TeacherText(source="x.jsonl"),)})
    found.cfg = recipe.model_copy(update={"train": train})
    with pytest.raises(NotTimed, match="teacher"):
        found.step(4, 4)


def test_a_probe_is_timed_on_as_many_prompts_as_are_done_soon(monkeypatch, made):
    """And counted up; where one takes too long it is not."""
    found = watched(monkeypatch, made, Ticking(base=0.0, block=0.0))
    cfg = recipe_of(made).probe.model_copy(update={"samples": 16, "steps": 8, "batch_size": 16})
    prompts, counts = [[1] * 12] * 16, []
    monkeypatch.setattr(pace, "probe", lambda _twin, _tokenizer, rows, own: counts.append((len(rows), own.samples)))
    one = found._floor(20, passes=6)
    monkeypatch.setattr(pace, "TOO_LONG", 5.5 * one)
    found._probing(None, prompts, cfg)
    assert max(counts) == (5, 5)
    monkeypatch.setattr(pace, "TOO_LONG", 100 * one)
    found._probing(None, prompts, cfg)
    assert max(counts) == (pace.PROBED[0], pace.PROBED[0])
    monkeypatch.setattr(pace, "TOO_LONG", 0.9 * one)
    with pytest.raises(pace.NotTimed, match="a probe of one prompt takes long itself"):
        found._probing(None, prompts, cfg)
