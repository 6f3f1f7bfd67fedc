"""Questions with options, in both views: the few logits that choose, the whole vocabulary there, full likelihoods.

A choice reads a small subspace of the logits, renormalised: it may stand where the distribution as a whole has moved
(arXiv 2603.24652). The option tokens are found, not given: they are where the options of an item part.

Shapes: N rows, O options of one item, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from recover.base import console, dist
from recover.base.errors import DataError
from recover.maths import divergence as spaces
from recover.measure.kinds.choice import margin
from recover.models.twin import Twin
from recover.probe.compare import Comparison, Finite, Rows
from recover.probe.records import Choice, Quantiles, Scored
from recover.probe.trajectory import along, check_ids, given
from recover.probe.views import Pair

VIEWS = ("dense", "pruned")
ZERO = torch.tensor([0])


@dataclasses.dataclass(frozen=True)
class Asked:
    """Token ids of prompt + option, one row an option, scored from `start` on; `label`: the right option."""

    options: tuple[tuple[int, ...], ...]
    start: int
    label: int

    def parting(self) -> tuple[int, list[int]] | None:
        """(place, the options' tokens there): where they part; None if two options have the same token there."""
        place = self.start
        shortest = min(map(len, self.options))
        while place < shortest and len({option[place] for option in self.options}) == 1:
            place += 1
        if place >= shortest:
            return None
        tokens = [option[place] for option in self.options]
        return (place, tokens) if len(set(tokens)) == len(tokens) else None


@dataclasses.dataclass(frozen=True)
class Answer:
    """What both views make of one item: log-likelihoods of its options, and, if they part at one token, `subspace`."""

    label: int
    likelihood: dict[str, list[float]]
    subspace: dict[str, float] | None
    logits: dict[str, list[float]]


def choice_drift(twin: Twin | Pair, items: Sequence[Asked], *, task: str = "choice", batch_size: int = 16) -> Choice:
    """The record of one task, the same on every process; items are dealt out among processes.

    Raises:
        DataError: no items, or one that is too long for a model.
        ModelError: logits that are not finite, naming the item.
    """
    pair = Pair.of(twin)
    comparison = Comparison(pair)
    if not items:
        raise DataError(f"task {task}: no items to choose in")
    for view in (pair.dense, pair.pruned):
        check_ids([list(option) for item in items for option in item.options], view, steps=0)
    found = dist.over(
        _batches(items, batch_size),
        lambda mine: [_answers(comparison, batch) for batch in console.track(mine, f"choices of {task}", unit="batch")],
    )
    return _record(task, [answer for answers in found for answer in answers])


def _batches(items: Sequence[Asked], size: int) -> list[list[tuple[int, Asked]]]:
    """Whole items, of no more than `size` rows together where one alone is not more."""
    batches: list[list[tuple[int, Asked]]] = []
    rows = size
    for number, item in enumerate(items):
        if rows + len(item.options) > size:
            batches.append([])
            rows = 0
        batches[-1].append((number, item))
        rows += len(item.options)
    return batches


def _answers(comparison: Comparison, batch: list[tuple[int, Asked]]) -> list[Answer]:
    pair = comparison.pair
    device = next(pair.dense.model.parameters()).device
    texts = [list(option) for _, item in batch for option in item.options]
    starts = [item.start for _, item in batch for _ in item.options]
    trajectory = given(texts, 0, device, starts=starts)
    row_N, step_N = (at_N.cpu() for at_N in trajectory.scored_BS.nonzero(as_tuple=True))
    numbers = torch.tensor([number for number, item in batch for _ in item.options])
    rows = Rows(numbers[row_N], step_N)
    dense_ND, pruned_ND = (along(view, trajectory).final_ND for view in (pair.dense, pair.pruned))
    target_N = trajectory.tokens_BS[trajectory.scored_BS]
    sums = {
        name: _sums(comparison.expected(lens, h_ND, target_N, rows, name), row_N, len(texts))
        for name, lens, h_ND in (("dense", comparison.dense, dense_ND), ("pruned", comparison.pruned, pruned_ND))
    }
    parted, first = {}, 0
    for number, item in batch:
        parting = item.parting()
        if parting is not None:
            place, tokens = parting
            at = int(((row_N == first) & (step_N == place - item.start)).nonzero()[0])
            parted[number] = (dense_ND[at : at + 1], pruned_ND[at : at + 1], tokens)
        first += len(item.options)
    found = _subspaces(comparison, parted)
    answers, first = [], 0
    for number, item in batch:
        span = slice(first, first + len(item.options))
        answers.append(Answer(item.label, {name: sums[name][span] for name in VIEWS}, *found.get(number, (None, {}))))
        first += len(item.options)
    return answers


def _sums(value_N: Tensor, row_N: Tensor, rows: int) -> list[float]:
    return torch.zeros(rows, dtype=torch.float64).index_add_(0, row_N, value_N).tolist()


Subspace = tuple[dict[str, float], dict[str, list[float]]]  # figures, and both views' logits of the options


def _subspaces(comparison: Comparison, parted: dict[int, tuple[Tensor, Tensor, list[int]]]) -> dict[int, Subspace]:
    """By number of the item: figures at the place where its options part, from both states there and their tokens.

    One transfer to the device and two from it, whatever the number of items.
    """
    if not parted:
        return {}
    finite, found = Finite(), {}
    options = [tokens for _, _, tokens in parted.values()]
    tokens_O = torch.tensor([token for tokens in options for token in tokens], device=comparison.device)
    split = tokens_O.split([len(tokens) for tokens in options])
    for (number, (h_dense_1D, h_pruned_1D, _)), at_O in zip(parted.items(), split, strict=True):
        found[number] = _subspace(comparison, h_dense_1D, h_pruned_1D, at_O, Rows(torch.tensor([number]), ZERO), finite)
    finite.require()
    plain = iter(torch.cat([value for figures in found.values() for value in figures.values()]).tolist())
    found = {
        number: {name: [next(plain) for _ in value] for name, value in figures.items()}
        for number, figures in found.items()
    }
    return {
        number: (
            {name: value[0] for name, value in figures.items() if name not in VIEWS},
            {name: figures[name] for name in VIEWS},
        )
        for number, figures in found.items()
    }


def _subspace(
    comparison: Comparison, h_dense_1D: Tensor, h_pruned_1D: Tensor, tokens_O: Tensor, row: Rows, finite: Finite
) -> dict[str, Tensor]:
    """Drift among the option tokens, renormalised, and of the whole vocabulary, at the place where options part.

    Each of one number, and under each view's name the logits of the options; in float64, on the device.
    """
    z_dense_1V = finite.checked(comparison.dense.logits(h_dense_1D), row, "dense view (of a choice)")
    z_pruned_1V = finite.checked(comparison.pruned.logits(h_pruned_1D), row, "pruned view (of a choice)")
    whole = spaces.probability_drift(z_dense_1V, z_pruned_1V, 1.0)
    z_dense_1O, z_pruned_1O = z_dense_1V[:, tokens_O].double(), z_pruned_1V[:, tokens_O].double()
    part = spaces.probability_drift(z_dense_1O, z_pruned_1O, 1.0)
    figures = {f"drift.{name}": part[name] for name in ("kl", "probability")}
    figures |= {f"vocabulary.{name}": whole[name] for name in ("kl", "probability")}
    for name, z_1V in (("dense", z_dense_1V), ("pruned", z_pruned_1V)):
        figures[f"mass.{name}"] = spaces.log_probabilities(z_1V)[:, tokens_O].double().exp().sum()[None]
    figures |= {"dense": z_dense_1O[0], "pruned": z_pruned_1O[0]}
    return {name: value.double() for name, value in figures.items()}


def _record(task: str, answers: list[Answer]) -> Choice:
    inside = [answer for answer in answers if answer.subspace is not None]
    figures: dict[str, dict[str, Quantiles]] = {"drift": {}, "vocabulary": {}, "mass": {}}
    for group, names in (("drift", ("kl", "probability")), ("vocabulary", ("kl", "probability")), ("mass", VIEWS)):
        for name in names:
            figures[group][name] = spaces.quantiles([answer.subspace[f"{group}.{name}"] for answer in inside])  # type: ignore[index]
    tokens = _scored([(answer.logits, answer.label) for answer in inside])
    return Choice(
        task,
        len(answers),
        len(inside),
        **figures,
        margin=tokens["margin"],
        accuracy=tokens["accuracy"],
        same_choice=tokens["same_choice"],
        rank_changed=tokens["rank_changed"],
        likelihood=_scored([(answer.likelihood, answer.label) for answer in answers]),
    )


def _scored(rows: list[tuple[dict[str, list[float]], int]]) -> Scored:
    """Both views' choices by one kind of score. A right option counts only if it beats every other one."""
    margins = {name: [margin(scores[name], label) for scores, label in rows] for name in VIEWS}
    orders = [[_order(scores[name]) for name in VIEWS] for scores, _ in rows]
    return {
        "margin": {name: spaces.quantiles(values) for name, values in margins.items()},
        "accuracy": {name: _mean([value > 0 for value in values]) for name, values in margins.items()},
        "same_choice": _mean([dense[0] == pruned[0] for dense, pruned in orders]),
        "rank_changed": _mean([dense != pruned for dense, pruned in orders]),
    }


def _order(scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda option: -scores[option])


def _mean(values: list[bool]) -> float | None:
    return sum(values) / len(values) if values else None
