"""What a step, a text and a probe take on this machine: the run's own code, timed on a few blocks of the model.

A pass takes what embeddings, head and loss take, and what each block takes. So a model of one block of each kind is
timed, and beside it, by turns, one of further blocks of a kind: what they take more is what a block takes, and the rest
is arithmetic (`Sample.whole`). No weight is read for it: they are random, of the sizes, dtype and attention of the
model's own. A small model is read as it is, and says also how long its texts are.

What would take long at its real size is timed on fewer rows or tokens, and counted up: a CPU's time goes with them. A
GPU is waited for, and warmed up until its steps are recorded.

Legend: K blocks timed, B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import accelerate
import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from recover.base import console, dist, memory
from recover.config import recipe
from recover.config.prune import Magnitude
from recover.config.tasks import CodeFile, RetrievalFile, WritingFile
from recover.config.train import split_batch
from recover.export.merge import pruned_config
from recover.maths.score import mean
from recover.measure.kinds.generate import FENCE
from recover.measure.model import ModelUnderTest, work_of
from recover.measure.tasks import Task
from recover.models.arch import arch_of, blocks_of
from recover.models.attention import by_rows, packing_configs
from recover.models.load import Description, attention_for, checked_config, load_model, ready
from recover.models.plan import Plan
from recover.models.twin import Held, Twin
from recover.probe.probe import probe
from recover.probe.tasks import task_drift
from recover.prune import registry
from recover.prune.stream import kl_rows, next_tokens, nll_sum, row_sum, variance_rows
from recover.text.decode import Writing, keys, nucleus, write
from recover.text.generate import generate, plain
from recover.text.prompts import Prompt
from recover.text.stepping import fits, free_memory
from recover.train.data import collator, packer, row_sizes, with_scored
from recover.train.train import may_be_graphed
from recover.train.trials import Bench, Trials

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from recover.config.prune import Pruning

SMALL = 40_000_000  # parameters of a model that is read and timed as it is
MOST = 8  # blocks that are timed beside one of each kind, at most
TURNS, PATIENT = 2, 1.0  # timings of each piece; seconds after which no further turn begins
AT_ONCE = 0.4  # seconds that a piece of work is to take, by the floor
LEAST_TOKENS, LEAST_ROWS = 64, 8  # fewer, and a product is bound by reading the weights
STEP_AT_ONCE = 2.0  # and a training step, or a pruning, whose time does not go with its tokens in a small model
PROBED = 8, 12  # prompts and steps of a probe, at most
JUDGED = 1024  # positions whose output is held against dense's
TOO_LONG = 6.0  # seconds of the least step, by the floor: then nothing is timed
ALLOWED = 90.0  # seconds after which nothing further is timed
EFFICIENCY = 0.35  # of the rate of a bare product that passes reach, by the floor
ASKED = 16  # prompts to which a small model writes, to see how long its texts are
WRITES = 8.0  # seconds that this may take

_clock = time.perf_counter
Work = Callable[[], Any]


class NotTimed(Exception):
    """Something is not timed here, and why."""


def spread(rows: Sequence[Any], count: int) -> list[Any]:
    """At most so many of them, evenly spread."""
    return [*rows] if len(rows) <= count else [rows[at * len(rows) // count] for at in range(count)]


def of_mean_length(items: Sequence[Any], texts: Sequence[str], count: int) -> list[Any]:
    """At most so many items whose texts are about as long as the mean."""
    order = sorted(range(len(items)), key=lambda at: len(texts[at]))
    goal = mean([len(texts[at]) for at in order])
    near = min(range(len(order)), key=lambda place: abs(len(texts[order[place]]) - goal))
    start = max(0, min(near - count // 2, len(order) - count))
    return [items[at] for at in order[start : start + count]]


@dataclass(frozen=True)
class Span:
    """Seconds of a pass through the whole model: `base` without blocks, `blocks` of all of them."""

    base: float
    blocks: float = 0.0

    def at(self, kept: float = 1.0) -> float:
        """Seconds where this share of the blocks' work is left."""
        return self.base + kept * self.blocks

    def times(self, factor: float) -> Span:
        return Span(self.base * factor, self.blocks * factor)

    def plus(self, other: Span) -> Span:
        return Span(self.base + other.base, self.blocks + other.blocks)

    def less(self, other: Span) -> Span:
        """What this takes more than `other`, in neither part less than nothing: timings are noisy."""
        return Span(max(0.0, self.base - other.base), max(0.0, self.blocks - other.blocks))


@dataclass(frozen=True)
class Sample:
    """Blocks that stand for all: the `first` of each kind, and of each kind in turn `more`, which stand for `left`."""

    first: tuple[int, ...]
    more: tuple[tuple[int, ...], ...]
    left: tuple[int, ...]  # blocks of that kind in the whole model, without the first

    @property
    def blocks(self) -> tuple[int, ...]:
        """All that are timed, ascending."""
        return tuple(sorted({*self.first, *(block for more in self.more for block in more)}))

    @property
    def models(self) -> list[tuple[int, ...]]:
        """The blocks of each model that is timed: the first ones alone, then with more of each kind."""
        return [self.first, *(tuple(sorted({*self.first, *more})) for more in self.more)]

    def whole(self, seconds: Sequence[float]) -> Span:
        """Of the whole model, from the seconds of each of `models`."""
        least, *others = seconds
        each = [max(0.0, more - least) / len(blocks) for more, blocks in zip(others, self.more, strict=True)]
        first = min(least, sum(each))  # of the first ones of these kinds; that of a kind's only block stays in `base`
        return Span(least - first, first + sum(one * left for one, left in zip(each, self.left, strict=True)))


def sample(kinds: Sequence[Sequence[int]], most: int) -> Sample:
    """One block of each kind, and of those that there are more of, `most` in all beside them, one at least."""
    first = tuple(sorted(kind[0] for kind in kinds))
    repeated = [kind for kind in kinds if len(kind) > 1]
    each = max(1, most // max(1, len(repeated)))
    more = tuple(tuple(kind[1 : 1 + each]) for kind in repeated)
    return Sample(first, more, tuple(len(kind) - 1 for kind in repeated))


def kinds_of(config: PretrainedConfig, *, trust: bool = False) -> list[list[int]]:
    """Blocks that take equally long: of one layer type and equal tensors. Of a kind with the last block, that first."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust, attn_implementation="eager")
    listed = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    found: dict[Any, list[int]] = {}
    for number, (block, name) in enumerate(zip(blocks_of(model), listed, strict=True)):
        shapes = tuple((key, tuple(value.shape)) for key, value in block.named_parameters())
        found.setdefault((name, shapes), []).append(number)
    last = config.num_hidden_layers - 1
    return [[last, *kind[:-1]] if kind[-1] == last else kind for kind in found.values()]


def of_blocks(config: PretrainedConfig, blocks: Sequence[int]) -> PretrainedConfig:
    """The config of a model of these blocks alone."""
    gone: Any = tuple(number for number in range(config.num_hidden_layers) if number not in blocks)
    plan = Plan("none", config.num_hidden_layers, parallel=arch_of(config).together(config), sites=gone)
    return pruned_config(config, plan)


def random_model(cfg: recipe.Model, config: PretrainedConfig) -> PreTrainedModel:
    """A model of this config with random weights, on this process's device."""
    attention = attention_for(cfg, config)
    with torch.random.fork_rng(), torch.device(dist.device()):
        model: Any = AutoModelForCausalLM.from_config(
            config,
            dtype=getattr(torch, cfg.dtype),
            attn_implementation=attention,
            trust_remote_code=cfg.trust_remote_code,
        )
    by_rows(model)
    return ready(model)


def cut(model: PreTrainedModel, blocks: Sequence[int]) -> PreTrainedModel:
    """A model of these of its blocks, in the same memory."""
    config, prefix = of_blocks(model.config, blocks), f"{arch_of(model).blocks}."
    with accelerate.init_empty_weights(), model.device:
        attention = model.config._attn_implementation
        made = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    held, found = model.state_dict(), {}
    for name in made.state_dict():
        inside = name.removeprefix(prefix)
        number, _, rest = inside.partition(".")
        found[name] = held[f"{prefix}{blocks[int(number)]}.{rest}" if inside != name else name]
    made.load_state_dict(found, strict=True, assign=True)
    made.tie_weights()
    by_rows(made)
    return made.requires_grad_(False).eval()


@dataclass
class _Few:
    """A model of some of the blocks, and what it is seen as; twins share its weights."""

    model: PreTrainedModel
    masked: bool
    held: Held = field(init=False)
    twin: Twin = field(init=False)

    def __post_init__(self) -> None:
        self.held = Held(self.model)
        self.twin = self.fresh()

    def fresh(self) -> Twin:
        """A twin of nothing dropped; masks as of magnitude where the run has some: they take as long as any."""
        plan: Plan = Plan.none(self.model.config.num_hidden_layers)
        if not self.masked:
            return self.held.twin(plan)
        cfg = Magnitude(kind="magnitude", sparsity=0.5)
        plan, masks, weights = registry.prune(self.held.twin(plan), cfg, [])
        return self.held.twin(plan, masks, weights)


@dataclass(frozen=True)
class Decoding:
    """Seconds of one token more in each of `rows` rows: `fixed` and `row` a row; and of `setup`, once a call."""

    fixed: Span
    row: Span
    setup: float
    refills: bool  # a row that ends is filled again: the time goes with the steps
    shrinks: bool  # a row that ends is given up

    def seconds(self, texts: int, length: float, longest: float, rows: int, kept: float = 1.0) -> float:
        """For so many texts of this length in the mean, `rows` at once."""
        if not texts:
            return 0.0
        rows = min(rows, texts)
        if self.refills:
            steps = max(longest, texts * length / rows * FILLED) if texts > rows else longest
            return self.setup + steps * (self.fixed.at(kept) + rows * self.row.at(kept))
        batches = math.ceil(texts / rows)
        alive = min(longest, length * HELD) if self.shrinks else longest
        return batches * (self.setup + longest * self.fixed.at(kept)) + texts * alive * self.row.at(kept)


FILLED = 16 / 15  # rows are filled again when an eighth is free: half of that is idle in the mean
HELD = 8 / 7  # rows are given up when a quarter has ended: half of that is held in the mean


@dataclass(frozen=True)
class _Counted:
    """What a call takes whatever it does, and what each of the things that it does takes."""

    begun: Span
    one: Span

    def of(self, count: float) -> Span:
        return self.begun.plus(self.one.times(count))

    def each(self, things: float) -> _Counted:
        """Where what is counted is so many things."""
        return _Counted(self.begun, self.one.times(things))


class Pace:
    """The sampled models of a recipe, and what is timed on them; all figures are of the whole dense model.

    Raises NotTimed: this machine is too slow for it, or has too little memory; or weights come and go.
    """

    def __init__(
        self, cfg: recipe.Recipe, model: Description, rate: float, *, masked: bool, local: bool, processes: int = 1
    ) -> None:
        """`rate`: FLOP/s of a bare product. `local`: the weights are at hand. `processes`: of the run."""
        self.cfg, self.description, self.rate, self.processes = cfg, model, rate, processes
        self.device, self.began = dist.device(), _clock()
        self._refuse()
        self.real = local and model.parameters <= SMALL
        config = checked_config(cfg.model)
        kinds = kinds_of(config, trust=cfg.model.trust_remote_code)
        repeated = sum(len(kind) - 1 for kind in kinds)
        each = max(1, max(model.block_parameters))
        most = min(MOST, max(1, model.embedding_parameters // each), max(1, (model.blocks - len(kinds)) // 2))
        self.sample = sample(kinds, repeated if self.real else most)
        self._check(self.sample)
        if self.real:
            largest, blocks = ready(load_model(cfg.model)), {number: number for number in range(model.blocks)}
        else:
            largest = random_model(cfg.model, of_blocks(config, self.sample.blocks))
            blocks = {number: at for at, number in enumerate(self.sample.blocks)}
        self.whole = largest if self.real else None
        self.few = [_Few(cut(largest, [blocks[number] for number in model]), masked) for model in self.sample.models]
        self.parameters = sum(value.numel() for value in largest.parameters())
        self.known: dict[tuple[Any, ...], Any] = {}  # what was timed, by what it is of

    def _refuse(self) -> None:
        if dist.zero_stage() > 0:
            raise NotTimed("DeepSpeed deals the weights out")
        if self.cfg.model.offload != "none" or self.cfg.model.load_in is not None:
            raise NotTimed("weights that come and go (model.offload, model.load_in) set the pace")
        if self.cfg.train.shard_weights and self.processes > 1:
            raise NotTimed("weights that come and go (train.shard_weights) set the pace")

    def _check(self, chosen: Sample) -> None:
        """Raises NotTimed where the sampled model has no room, or its least step takes too long."""
        model = self.description
        left = sum(model.block_parameters[number] for number in chosen.blocks)
        parameters = model.parameters - sum(model.block_parameters) + left
        needed = parameters * getattr(torch, self.cfg.model.dtype).itemsize
        needed += LEAST_TOKENS * model.vocabulary * memory.LOGIT_BYTES
        if needed > (free := free_memory(self.device)) / 2:
            raise NotTimed(
                f"a few blocks, {console.size(needed)}, have no room beside what else is in memory "
                f"({console.size(free)} free)"
            )
        self.parameters = parameters
        if (least := self._floor(LEAST_TOKENS, passes=3)) > TOO_LONG:
            raise NotTimed(f"{LEAST_TOKENS} tokens through a few blocks take {console.duration(least)} at least")

    def _floor(self, tokens: float, passes: float = 1) -> float:
        """Seconds that so many tokens take in the largest sampled model at least."""
        return 2 * self.parameters * passes * tokens / (self.rate * EFFICIENCY)

    def _affordable(self, tokens: int, passes: float = 1, least: int = LEAST_TOKENS, seconds: float = AT_ONCE) -> int:
        """As many of these tokens as a piece of work may have."""
        return max(1, min(tokens, max(least, int(seconds / self._floor(1, passes)))))

    def _timed(self, works: Sequence[Work]) -> list[float]:
        """The median seconds of each, by turns, so that what else runs is the same for all. The first turn warms up."""
        if _clock() - self.began > ALLOWED:
            raise NotTimed(f"what was timed before took {console.duration(ALLOWED)}")
        warm = 3 if self.device.type == "cuda" else 1
        first: list[float] = []
        for _ in range(warm):
            first = [self._once(work) for work in works]
        if sum(first) > PATIENT:
            return first  # what the first turn sets up is lost in it
        laps: list[list[float]] = [[] for _ in works]
        began = _clock()
        for turn in range(TURNS):
            if turn and _clock() - began > PATIENT:
                break
            for lap, work in zip(laps, works, strict=True):
                lap.append(self._once(work))
        return [statistics.median(lap) for lap in laps]

    def _once(self, work: Work) -> float:
        self._wait()
        began = _clock()
        work()
        self._wait()
        return _clock() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _spans(self, *pieces: Sequence[Work]) -> list[Span]:
        """Of each piece, given as its work on each of the sampled models."""
        seconds = iter(self._timed([work for piece in pieces for work in piece]))
        return [self.sample.whole([next(seconds) for _ in piece]) for piece in pieces]

    def forward(self, rows: int, length: int) -> Span:
        """Of one token that the dense view reads, among so many rows of this length, without the head."""
        tokens = self._affordable(rows * length)
        length = min(-(-length // 16) * 16, self.description.context or length, tokens)
        rows = max(1, tokens // length)
        return self._once_for(("forward", rows, length), lambda: self._forward(rows, length))

    def _forward(self, rows: int, length: int) -> Span:
        ids_BT = self._ids(rows, length)

        def reads(few: _Few) -> Work:
            def work() -> None:
                with few.twin.dense() as dense:
                    dense(input_ids=ids_BT, use_cache=False, logits_to_keep=1)

            return work

        return self._spans([reads(few) for few in self.few])[0].times(1 / ids_BT.numel())

    def _ids(self, rows: int, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.description.vocabulary, (rows, length), generator=generator).to(self.device)

    def decoding(self, rows: int, columns: int) -> Decoding:
        """Of a token in each of so many rows at once, where the cache has so many columns."""
        width = 256 if self.device.type == "cuda" else 32  # what a recorded step sees is a multiple of it
        columns = -(-columns // width) * width
        rows = 2 ** round(math.log2(rows))
        return self._once_for(("decoding", rows, columns), lambda: self._decoding(rows, columns))

    def _once_for(self, key: tuple[Any, ...], time_it: Callable[[], Any]) -> Any:
        if key not in self.known:
            self.known[key] = time_it()
        return self.known[key]

    def _decoding(self, rows: int, columns: int) -> Decoding:
        cuda, ours = self.device.type == "cuda", fits(self.few[0].twin.base)
        low, high = (33, 97) if cuda else (1, 9)  # tokens; on a GPU behind those that are recorded
        many = self._affordable(rows, passes=high - low, least=LEAST_ROWS)
        less = max(1, many // 4)
        length = max(1, min(columns, self.description.context or columns) - high)
        prompt = self._ids(1, length)[0].tolist()
        writer = write if ours else plain

        def writes(few: _Few, count: int, limit: int) -> Work:
            how = Writing(limit, (), 0, count)

            def work() -> None:
                with torch.no_grad(), few.twin.folded():
                    for _ in writer(few.twin.base, [prompt] * count, how):
                        pass

            return work

        def piece(count: int, limit: int) -> list[Work]:
            return [writes(few, count, limit) for few in self.few]

        begun, many_span, few_span = self._spans(piece(many, low), piece(many, high), piece(less, high))
        step = many_span.less(begun).times(1 / (high - low))
        # Of fewer rows the beginning is taken for as long, which it is but for a prompt that is read once.
        fewer = few_span.less(begun).times(1 / (high - low))
        row = step.less(fewer).times(1 / (many - less)) if many > less else Span(0.0)
        fixed = step.less(row.times(many))
        setup = max(0.0, begun.at() - (low - 1) * step.at()) if cuda else 0.0
        return Decoding(fixed, row, setup, refills=cuda and ours, shrinks=ours)

    def draw(self, rows: int, sampling: recipe.Sampling | None) -> float:
        """Seconds of a step and row that a drawn token takes beside the likeliest."""
        if sampling is None:
            return 0.0
        drawn = sampling.temperature, sampling.top_p
        return self._once_for(("draw", *drawn), lambda: self._draw(min(rows, 64), *drawn))

    def _draw(self, rows: int, temperature: float, top_p: float) -> float:
        logits_BV = torch.randn(rows, self.description.vocabulary, device=self.device)
        key_B2, place_B = keys(0, range(rows), self.device), torch.zeros(rows, dtype=torch.long, device=self.device)
        draw = nucleus(temperature, top_p)
        return self._timed([lambda: draw(logits_BV, key_B2, place_B)])[0] / rows

    def step(self, prompt: int, answer: int) -> tuple[Span, float]:
        """(of a micro-batch with its backward pass and what a step does beside, the share of the dense pass in it).

        `prompt` and `answer`: tokens of a sequence, of which the answer's are scored.
        """
        cfg, micro = self.cfg.train, split_batch(self.cfg.train, self.processes).micro
        length = min(cfg.length, prompt + answer)
        tokens = self._affordable(micro * length, passes=3, seconds=STEP_AT_ONCE)
        rows, used = max(1, tokens // length), min(length, tokens)
        batch = [self._row(used, max(1, round(used * answer / (prompt + answer)))) for _ in range(rows)]
        once = cfg.model_copy(
            update={
                "batch_size": rows,
                "micro_batch_size": rows,
                "cache": None,
                "lora": cfg.lora.model_copy(update={"blocks": "all"}),
            }
        )
        with self._benches(once, batch, rows) as benches:
            works = [lambda bench=bench, adam=adam: bench.step(0, adam) for bench, adam in benches]
            found = self._spans(works)[0]
        share = (
            0.0 if cfg.cache is not None or cfg.teacher is not None else 1 / (4 if cfg.gradient_checkpointing else 3)
        )
        return found.times(micro * length / (rows * used)), share

    def _row(self, length: int, answer: int) -> Any:
        ids = np.random.default_rng(0).integers(self.description.vocabulary, size=length)
        return {"input_ids": ids, "completion_mask": np.arange(length) >= length - answer}

    @contextmanager
    def _benches(self, cfg: recipe.Train, rows: list[Any], micro: int) -> Iterator[list[tuple[Bench, Any]]]:
        """A twin with adapters of each sampled model, ready for its steps."""
        if cfg.teacher is not None:
            raise NotTimed("a teacher's file takes the place of the dense pass")
        plan, found = Trials(cfg.lr, (cfg.lr,), 1, (), 0, ""), []
        try:
            for few in self.few:
                twin = few.fresh()
                packed = bool(packing_configs(twin.base))
                twin.add_lora(cfg.lora)
                graphed = packed and self.processes == 1 and may_be_graphed(twin, cfg, self.description.active)
                sizes = row_sizes([sum(len(row["input_ids"]) for row in rows)]) if graphed else ()
                collate = packer(0, cfg.loss.scored, cfg.length, sizes) if packed else collator(0, cfg.loss.scored)
                bench = Bench(twin, cfg, rows, plan, with_scored(collate), None, micro, 0, graphed=graphed)
                bench.__enter__()
                found.append((bench, bench.optimizer(cfg.lr)))
                twin.model.train()
            yield found
        finally:
            for bench, _ in reversed(found):
                bench.__exit__(None, None, None)

    def scoring(self, task: Task, tokenizer: PreTrainedTokenizerBase, items: int) -> Span:
        """Of the first so many items of a task that only reads."""
        return self._once_for(("scoring", task.name), lambda: self._scoring(task, tokenizer)).of(items)

    def _scoring(self, task: Task, tokenizer: PreTrainedTokenizerBase) -> _Counted:
        cfg, file, items = self.cfg.measure, task.file, task.items[: self.cfg.measure.limit]
        tested = [ModelUnderTest(few.twin.base, tokenizer, cfg, self.cfg.seed) for few in self.few]
        if isinstance(file, RetrievalFile):
            texts = list(dict.fromkeys(text for item in items for text in (item.query, *item.documents)))

            def embeds(model: ModelUnderTest, count: int) -> Work:
                return lambda: model.embed(texts[:count], length=file.length, title=task.name)

            found = self._counted(tested, embeds, min(len(texts), cfg.batch_size))
            return found.each(len(texts) / len(items))

        # Of many items each batch holds such as are alike; few are one batch, as long as the longest.
        sorted_ = len(items) * max(len(getattr(item, "options", " ")) for item in items) > 2 * cfg.batch_size

        def scores(model: ModelUnderTest, count: int) -> Work:
            some = of_mean_length(items, task.asked, count) if sorted_ else spread(items, count)
            return lambda: work_of(task.kind).measure(model, file, some, None)

        return self._counted(tested, scores, min(len(items), max(LEAST_ROWS, cfg.batch_size // 4)))

    def _counted(self, subjects: Sequence[Any], does: Callable[[Any, int], Work], most: int) -> _Counted:
        """Of a call on `most` things, and of one on fewer: what a call takes at all, and what each thing takes."""
        less = max(1, most // 4)
        if most == less:
            return _Counted(Span(0.0), self._spans([does(one, most) for one in subjects])[0])
        some, fewer = self._spans(*([does(one, count) for one in subjects] for count in (most, less)))
        each = some.less(fewer).times(1 / (most - less))
        return _Counted(some.less(each.times(most)), each)

    def drifting(self, task: Task, tokenizer: PreTrainedTokenizerBase, items: int) -> Span:
        """Of so many items of a task of options or documents, held by both views against each other."""
        if items == 0:
            return Span(0.0)
        size = self.cfg.probe.batch_size

        def drifts(few: _Few, count: int) -> Work:
            return lambda: task_drift(few.twin, tokenizer, [task], items=count, batch_size=size)

        def found() -> _Counted:
            return self._counted(self.few, drifts, min(len(task.items), LEAST_ROWS))

        return self._once_for(("drifting", task.name), found).of(items)

    def probing(self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], cfg: recipe.Probe) -> Span:
        """Of a whole probe: what each step of a batch takes, and what each position takes."""
        return self._once_for(("probing",), lambda: self._probing(tokenizer, prompts, cfg))

    def _probing(self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], cfg: recipe.Probe) -> Span:
        steps, length = min(PROBED[1], cfg.steps), mean([len(row) for row in prompts])
        fits = int(TOO_LONG / self._floor(steps + length, passes=6))
        if fits < 1:
            raise NotTimed("a probe of one prompt takes long itself")
        several = min(PROBED[0], len(prompts), fits)

        def probes(few: _Few, count: int) -> Work:
            own = cfg.model_copy(update={"samples": count, "steps": steps, "batch_size": count})
            return lambda: probe(few.twin, tokenizer, [*prompts[:count]], own)

        found = self._counted(self.few, probes, several)
        samples = min(cfg.samples, len(prompts))
        batches = math.ceil(samples / cfg.batch_size)
        return found.begun.times(batches * cfg.steps / steps).plus(found.one.times(samples * cfg.steps / steps))

    def judging(self, score: str) -> float:
        """Seconds that a search takes to score a candidate at one position, once its last hidden state is there."""
        return self._once_for(("judging", score), lambda: self._judging(score))

    def _judging(self, score: str) -> float:
        twin, tokens = self.few[0].twin, self._affordable(JUDGED)
        base = twin.base
        h_ND = torch.randn(tokens, self.description.width, device=self.device, dtype=base.dtype)
        if score == "perplexity":
            targets_N = next_tokens(self._ids(1, tokens).cpu())  # pyright: ignore[reportArgumentType]
            return self._timed([lambda: nll_sum(twin, h_ND, targets_N)])[0] / tokens
        rows = variance_rows if score == "variance" else kl_rows
        return self._timed([lambda: row_sum(twin, rows, h_ND, h_ND)])[0] / tokens

    def pruned(self, plan: Plan, masks: Any = None, weights: Any = None) -> Twin | None:
        """The whole model as it is pruned so; None where it is not at hand."""
        return None if self.whole is None else Held(self.whole).twin(plan, masks, weights)

    def pruning(self, cfg: Pruning) -> Span:
        """Of finding what goes, for a way that takes the blocks one by one: as its own code does it on random text."""
        calibration = getattr(cfg, "calibration", None)
        if calibration is None:
            return self._spans([lambda few=few: registry.prune(few.twin, cfg, []) for few in self.few])[0]
        tokens = self._affordable(calibration.samples * calibration.length, passes=2, seconds=STEP_AT_ONCE)
        length = min(calibration.length, tokens)
        used = max(1, tokens // length)

        def prunes(few: _Few, samples: int) -> Work:
            batches: Any = list(self._ids(samples, length).cpu().split(calibration.batch_size))
            return lambda: registry.prune(few.twin, cfg, batches)

        found = self._counted(self.few, prunes, 2 * used)
        return found.of(round(calibration.samples * calibration.length / length))

    def length(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        *,
        limit: int,
        rows: int,
        chat: bool | None,
        file: WritingFile | None = None,
        twin: Twin | None = None,
    ) -> tuple[float, float] | None:
        """(mean, longest) tokens of what the model itself writes to a few of these prompts; None: it is not at hand.

        `rows`: that the run writes at once. `twin`: whose pruned view writes, in place of the dense model.
        """
        if self.whole is None or not prompts:
            return None
        some = spread(prompts, ASKED)
        if self.decoding(rows, limit).seconds(len(some), limit, limit, len(some)) > WRITES:
            return None
        with nullcontext() if twin is None else twin.folded():
            texts = generate(
                self.whole if twin is None else twin.model,
                tokenizer,
                some,
                max_new_tokens=limit,
                batch_size=ASKED,
                chat=chat,
                stop=file.stop if file else (),
                unless=FENCE if isinstance(file, CodeFile) else None,
            )
        lengths = [len(text.ids) for text in texts]
        return mean(lengths), max(lengths)
