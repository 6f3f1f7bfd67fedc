"""Tokens written per second: recover's slots beside transformers' own ways, same prompts, same model, one run.

    python benchmarks/generate.py                                             # embedded:fable-2m, on a CPU: 30 s
    python benchmarks/generate.py FOLDER_OR_GGUF --dtype bfloat16 --batch 256 # on a GPU: within 90 s
    python benchmarks/generate.py random:7b --batch 64                        # Qwen2.5-7B's shape, on a GPU
    ... --out FOLDER --profile                                                # generate.json; where the time goes

Greedy. First recover and plain `generate` by turns, after a warm-up of both: once every text is `--tokens` long, once
texts go to their end (only tokens up to the end token count). The ratio is taken within each pair of turns; ratio and
rates are medians, [p10, p90] beside. Then, once each and as long as `--seconds` lasts, the other ways. `equal` is the
share of texts whose ids are those of plain `generate`: 100% in float32 on a CPU; in low precision, ties fall either
way. A variant that fails or runs out of time says so in its row.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from generate_profile import profile
from generate_ways import OTHERS, PAIR, Texts, Variant
from step_cost import SEVEN
from step_models import Bench

from recover.base import console, dist, provenance
from recover.base.console import quiet_libraries
from recover.config import recipe
from recover.measure.speed import spread, take_turns
from recover.measure.tasks import load_task
from recover.models.load import load_model, load_tokenizer, ready
from recover.report import words
from recover.text.decode import Writing
from recover.text.generate import writing
from recover.text.prompts import encode_prompt

RANDOM = "random:7b"
PAIR_SHARE = 0.5  # of the seconds: after these no further pair of turns is begun
PROFILE_SECONDS = 60  # at most, beside --seconds

SUBJECTS = ("rivers", "the moon", "bread", "trains", "music", "snow", "trees", "the sea", "clocks", "bees")
ASKS = (
    "Tell me about {}.",
    "Write a short story about {}.",
    "Why are {} important? Give reasons.",
    "List five facts about {}, one a line, and say for each why it matters.",
    "Explain {} to a child.",
)


@dataclasses.dataclass(frozen=True)
class Timing:
    """One pass over all prompts."""

    seconds: float
    texts: Texts

    @property
    def tokens(self) -> int:
        return sum(map(len, self.texts.values()))

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    def row(self, name: str, reference: Timing) -> dict[str, Any]:
        equal = sum(self.texts[item] == ids for item, ids in reference.texts.items()) / len(self.texts)
        figures = {"tokens_per_second": self.rate, "seconds": self.seconds, "tokens": self.tokens, "equal": equal}
        return {"ratio": self.rate / reference.rate, "variant": name, "repeats": 1} | figures


def main() -> None:
    arguments = _arguments()
    quiet_libraries()
    is_gpu = dist.device().type == "cuda"
    batch = arguments.batch or (256 if is_gpu else 16)
    count = arguments.prompts or (2 * batch if is_gpu else 5 * batch // 2)
    model, prompts_ids, how = (_random if arguments.model == RANDOM else _loaded)(arguments, count, batch)
    console.say(
        f"{words.machine(provenance.machine())}; torch {torch.__version__}, transformers {transformers.__version__}; "
        f"{arguments.model}, {arguments.dtype}; {count} prompts of {min(map(len, prompts_ids))} to "
        f"{max(map(len, prompts_ids))} tokens, batch {batch}, up to {arguments.tokens} new tokens"
    )
    found: dict[str, Any] = {
        "machine": provenance.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **{name: value for name, value in vars(arguments).items() if name != "out"},
        **{"batch": batch, "prompts": count},
    }
    for title, rows in measured(model, prompts_ids, how, arguments):
        console.table(f"ratio to plain generate, {title}", COLUMNS, map(_cells, rows))
        found[title] = rows
        _keep(arguments.out, found)
    if arguments.profile:
        with _within(time.monotonic() + PROFILE_SECONDS), torch.no_grad():
            found["profile"] = profile(model, prompts_ids[:batch], how)
        _keep(arguments.out, found)
    sys.stdout.flush()
    os._exit(0)  # a variant that ran out of time may have left a thread at work, which would be waited for


def _loaded(arguments: argparse.Namespace, count: int, batch: int) -> tuple[Any, list[list[int]], Writing]:
    cfg = recipe.Model(source=arguments.model, dtype=arguments.dtype)
    model, tokenizer = ready(load_model(cfg)), load_tokenizer(cfg)
    prompts_ids = [encode_prompt(tokenizer, prompt) for prompt in _prompts(arguments.model, count)]
    return model, prompts_ids, writing(model, tokenizer, max_new_tokens=arguments.tokens, batch_size=batch)


def _random(arguments: argparse.Namespace, count: int, batch: int) -> tuple[Any, list[list[int]], Writing]:
    """Random weights and prompts; no text ends by itself."""
    model = Bench(SEVEN, dist.device(), batch=1, length=1, chunk=1).dense()
    arguments.dtype = str(model.dtype).removeprefix("torch.")
    numbers = random.Random(0)
    prompts_ids = [[numbers.randrange(SEVEN.vocabulary) for _ in range(numbers.randint(35, 49))] for _ in range(count)]
    return model, prompts_ids, Writing(arguments.tokens, ends=(), pad=0, rows=batch)


def measured(
    model: Any, prompts_ids: Sequence[list[int]], how: Writing, arguments: argparse.Namespace
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(title, rows) as they are there, all within the seconds."""
    started = time.monotonic()
    deadline = started + arguments.seconds
    of_one_length = dataclasses.replace(how, ends=())
    rows, _ = pair(
        model, prompts_ids, of_one_length, arguments.repeats, started + PAIR_SHARE * arguments.seconds, deadline
    )
    yield f"every text {how.limit} tokens", rows
    rows, reference = pair(model, prompts_ids, how, 1, started, deadline)
    yield "texts to their end", rows
    if reference is not None:
        yield "texts to their end, other ways", others(model, prompts_ids, how, reference, deadline)


def _keep(out: Path | None, found: dict[str, Any]) -> None:
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "generate.json").write_text(json.dumps(found, indent=1) + "\n")


COLUMNS = ["ratio", "[p10, p90]", "variant", "tokens/s", "[p10, p90]", "seconds", "repeats", "tokens", "equal"]


def _cells(row: dict[str, Any]) -> list[Any]:
    if "error" in row:
        return [None, None, f"{row['variant']}: {row['error']}", *[None] * 6]
    ratios, rates = row.get("ratio_interval"), row.get("tokens_per_second_interval")
    return [
        round(row["ratio"], 2),
        ratios and f"[{ratios[0]:.2f}, {ratios[1]:.2f}]",
        row["variant"],
        round(row["tokens_per_second"]),
        rates and f"[{rates[0]:.0f}, {rates[1]:.0f}]",
        round(row["seconds"], 2),
        row["repeats"],
        row["tokens"],
        f"{row['equal']:.1%}",
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = f"folder, GGUF file, embedded:NAME, {RANDOM} (default: %(default)s)"
    parser.add_argument("model", nargs="?", default="embedded:fable-2m", help=source)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, help="rows written at a time (default: 256 on a GPU, else 16)")
    parser.add_argument("--prompts", type=int, help="default: 2 batches on a GPU, else 2.5")
    parser.add_argument("--tokens", type=int, default=128, help="most new tokens a text (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=80, help="for all variants together (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="least pairs of turns (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for generate.json")
    parser.add_argument("--profile", action="store_true", help="phases, top kernels, launch gaps of recover's way")
    return parser.parse_args()


def _prompts(source: str, count: int) -> list[str]:
    """Held-out stories for the embedded model, which knows nothing else; instructions for others."""
    if source == "embedded:fable-2m":
        some = [item.prompt for item in load_task("embedded:stories").items]
    else:
        some = [ask.format(subject) for subject in SUBJECTS for ask in ASKS]
    return [some[number % len(some)] for number in range(count)]


def pair(
    model: Any, prompts_ids: Sequence[list[int]], how: Writing, least: int, until: float, deadline: float
) -> tuple[list[dict[str, Any]], Timing | None]:
    """Rows of plain `generate` and recover, at least `least` turns each, more until `until`; a pass of the former."""
    passes: tuple[list[Timing], list[Timing]] = ([], [])

    def turn_of(variant: Variant, kept: list[Timing]) -> Callable[[], tuple[float]]:
        def turn() -> tuple[float]:
            kept.append(_timed(variant, model, prompts_ids, how))
            return (kept[-1].rate,)

        return turn

    names, turns = list(PAIR), [turn_of(variant, kept) for variant, kept in zip(PAIR.values(), passes, strict=True)]
    try:
        with _within(deadline):
            for variant in PAIR.values():
                _timed(variant, model, prompts_ids[: how.rows], how)
            take_turns(turns[0], turns[1], least=least, seconds=until - time.monotonic())
    except Exception as error:  # shown in a row: what was timed still counts
        failed = [_failure(" and ".join(names), error)]
    else:
        failed = []
    pairs = list(zip(*passes, strict=False))
    if not pairs:
        return failed, None
    rows = [pairs[0][side].row(name, pairs[0][0]) for side, name in enumerate(names)]
    for side, row in enumerate(rows):
        row["repeats"] = len(pairs)
        row["seconds"] = statistics.median(each[side].seconds for each in pairs)
        _set_spread(row, "ratio", [each[side].rate / each[0].rate for each in pairs])
        _set_spread(row, "tokens_per_second", [each[side].rate for each in pairs])
    return rows[::-1] + failed, pairs[0][0]


def _set_spread(row: dict[str, Any], key: str, values: Sequence[float]) -> None:
    if len(values) > 1:
        found = spread(values)
        row[key], row[f"{key}_interval"] = found["value"], found["interval"]


def others(
    model: Any, prompts_ids: Sequence[list[int]], how: Writing, reference: Timing, deadline: float
) -> list[dict[str, Any]]:
    """One row a variant, timed once after a warm-up."""
    rows: list[dict[str, Any]] = []
    for name, variant in OTHERS.items():
        try:
            with _within(deadline):
                _timed(variant, model, prompts_ids[: how.rows], how)
                rows.append(_timed(variant, model, prompts_ids, how).row(name, reference))
        except Exception as error:  # shown in the row: the other variants still count
            rows.append(_failure(name, error))
    return rows


def _failure(name: str, error: Exception) -> dict[str, Any]:
    return {"variant": name, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:60]}"}


@contextmanager
def _within(deadline: float) -> Iterator[None]:
    """What runs inside ends with a TimeoutError at the deadline."""

    def out_of_time(*_: Any) -> None:
        raise TimeoutError("out of time (--seconds)")

    left = deadline - time.monotonic()
    if left < 1:
        raise TimeoutError("no time left (--seconds)")
    signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, left)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@torch.no_grad()
def _timed(variant: Variant, model: Any, prompts_ids: Sequence[list[int]], how: Writing) -> Timing:
    start = _now()
    texts = variant(model, prompts_ids, how)
    return Timing(_now() - start, texts)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
