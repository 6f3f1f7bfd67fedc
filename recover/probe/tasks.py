"""Tasks in both views: which option is chosen, and which document ranks first; what a run and a diagnosis share.

A choice reads a small subspace of the logits, renormalised: it may stand where the distribution as a whole has moved
(arXiv 2603.24652). Here are the few logits that choose, the whole vocabulary there, and full likelihoods. The option
tokens are found, not given: they are where the options of an item part.

Retrieval uses the model as an embedder: do its pooled hidden states still rank documents as the dense model's do? Rows
of the file: {"query": "...", "documents": ["...", ...], "relevant": [0, 3]}; `relevant` may be left out.

Of tasks that write, the items that one view has right and the other wrong: KL at each token of the dense model's text.

Shapes: N rows, O options of one item, V vocabulary, B batch, T tokens, D width, E texts, G documents of one query.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recover.base import console, dist
from recover.base.clock import part
from recover.base.errors import DataError, ModelError
from recover.config.tasks import ChoiceFile, RetrievalFile, WritingFile
from recover.maths import divergence as spaces
from recover.maths.score import ndcg
from recover.measure.kinds.choice import Choice as ChoiceItem
from recover.measure.kinds.choice import margin
from recover.measure.kinds.retrieval import Search
from recover.measure.tasks import Task
from recover.models.twin import Twin
from recover.probe.compare import Comparison, Finite, Rows
from recover.probe.records import Choice, Quantiles, Record, Retrieval, Scored
from recover.probe.trajectory import Batch, along, batches_of, check_ids, given, positions
from recover.probe.views import Pair, View, hidden_states, running
from recover.text.generate import context_of
from recover.text.likelihood import option_rows
from recover.text.prompts import encode_prompt, text_ids
from recover.text.read import rows_at

KINDS = ("choice", "retrieval")
# Texts of a task that are read token by token, of items lost and of items won, and tokens of each.
TEXTS, TOKENS, TEXTS_AT_ONCE = 24, 192, 8


@part("probing")
def task_drift(
    twin: Twin | Pair, tokenizer: Any, tasks: Sequence[Task], *, items: int | None = None, batch_size: int = 16
) -> list[Record]:
    """The records of the choice and retrieval tasks among them, the same on every process; other kinds have none.

    `items`: of each task, the first ones; None: all; 0: no records.

    Raises:
        DataError: an item that is too long for a model.
        ModelError: logits or embeddings that are not finite, naming the item.
    """
    pair = Pair.of(twin)
    records: list[Record] = []
    for task in tasks if items != 0 else ():
        file, some = task.file, task.items[:items]
        if isinstance(file, ChoiceFile):
            asked = [_asked(tokenizer, file, item) for item in some]
            records.append(choice_drift(pair, asked, task=task.name, batch_size=batch_size))
        elif isinstance(file, RetrievalFile):
            queries = [_query_of(item) for item in some]
            contexts = [context_of(view.model) or file.length for view in (pair.dense, pair.pruned)]
            length = min(file.length, *contexts)
            records += retrieval_drift(pair, tokenizer, queries, task=task.name, length=length, batch_size=batch_size)
    return records


@part("probing")
def tokens_of_changed(
    twin: Twin | Pair, tokenizer: Any, task: Task, right: tuple[Sequence[float], Sequence[float]], ids: list[list[int]]
) -> dict[int, list[tuple[str, float]]]:
    """Item -> (piece of text, KL(dense || pruned) in nats) of each token of dense's own text, both views reading it.

    Of a task that writes, the first TEXTS items that are lost and as many that are won; `right`: of each item, 1.0
    where dense is right, and where pruned is. `ids`: dense's texts, of which the first TOKENS tokens are read. The same
    on every process; items whose text is empty are left out.

    Raises:
        DataError: a text is too long for a view. ModelError: logits that are not finite.
    """
    file = task.file
    if not isinstance(file, WritingFile):
        return {}
    pairs = list(enumerate(zip(*right, strict=True)))
    ways = ([item for item, (was, now) in pairs if sign * (was - now) > 0 and ids[item]] for sign in (1, -1))
    items = sorted(item for way in ways for item in way[:TEXTS])
    prompts = [encode_prompt(tokenizer, task.items[item].prompt, chat=file.wraps) for item in items]
    texts = [ids[item][:TOKENS] for item in items]
    rows = [([*prompt, *text], len(prompt)) for prompt, text in zip(prompts, texts, strict=True)]
    found = dist.over(rows, lambda mine: _token_kls(Pair.of(twin), mine))
    pieces = [pieces_of(tokenizer, text) for text in texts]
    return {item: list(zip(*each, strict=True)) for item, *each in zip(items, pieces, found, strict=True)}


def _token_kls(pair: Pair, rows: Sequence[tuple[list[int], int]]) -> list[list[float]]:
    """KL(dense || pruned) at each token of a text from where it starts."""
    comparison, device = Comparison(pair), next(pair.dense.model.parameters()).device
    found: list[list[float]] = []
    for first in range(0, len(rows), TEXTS_AT_ONCE):
        texts, starts = map(list, zip(*rows[first : first + TEXTS_AT_ONCE], strict=True))
        for view in (pair.dense, pair.pruned):
            check_ids(texts, view, steps=0)
        trajectory = given(texts, first, device, starts=starts)
        at = trajectory.scored_BS.cpu().nonzero()
        dense, pruned = (along(view, trajectory).final_ND for view in (pair.dense, pair.pruned))
        kl_N = comparison.kl(dense, pruned, Rows(at[:, 0] + first, at[:, 1]))
        found += [kl_N[at[:, 0] == number].tolist() for number in range(len(texts))]
    return found


def pieces_of(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text; nothing, where a letter is not whole yet or the token is no text."""
    pieces, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=True)
        whole = end == len(ids) or not text.endswith("\N{REPLACEMENT CHARACTER}")
        pieces.append(text[len(before) :] if whole else "")
        before = text if whole else before
    return pieces


def _asked(tokenizer: Any, file: ChoiceFile, item: ChoiceItem) -> Asked:
    rows = option_rows(tokenizer, item.prompt, item.options, separator=file.separator, chat=file.wraps)
    return Asked(tuple(tuple(row.ids) for row in rows), rows[0].start, item.label)


def _query_of(item: Search) -> Query:
    return Query(item.query, item.documents, item.relevant)


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
        lambda mine: [
            _answers(comparison, batch) for batch in console.track(mine, f"choices of {task}", unit="batches")
        ],
    )
    return _choice_record(task, [answer for answers in found for answer in answers])


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


def _choice_record(task: str, answers: list[Answer]) -> Choice:
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


POOLINGS = ("last", "mean")


@dataclasses.dataclass(frozen=True)
class Query:
    """One query, its documents, and which of them are relevant (None: the file does not say)."""

    query: str
    documents: tuple[str, ...]
    relevant: tuple[int, ...] | None = None


def read_queries(path: Path) -> list[Query]:
    """Every row of the file. Raises DataError: it cannot be read, is empty, or by line, what is wrong with a row."""
    found = [_query(row.where, row.value) for row in rows_at(str(path))]
    if not found:
        raise DataError(
            f"{path}: holds no rows, expected lines such as {{'query': '...', 'documents': ['...', '...']}}"
        )
    return found


def _query(where: str, row: Any) -> Query:
    documents = row.get("documents") if isinstance(row, dict) else None
    if not isinstance(documents, list) or len(documents) < 2 or not all(isinstance(x, str) and x for x in documents):
        raise DataError(f"{where}: 'documents': found {documents!r}, expected a list of two or more texts")
    query, relevant = row.get("query"), row.get("relevant")
    if not isinstance(query, str) or not query:
        raise DataError(f"{where}: 'query': found {query!r}, expected a text")
    if relevant is None:
        return Query(query, tuple(documents))
    if not isinstance(relevant, list) or not relevant or not all(i in range(len(documents)) for i in relevant):
        raise DataError(f"{where}: 'relevant': found {relevant!r}, expected indices from 0 to {len(documents) - 1}")
    return Query(query, tuple(documents), tuple(relevant))


def retrieval_drift(
    twin: Twin | Pair,
    tokenizer: Any,
    queries: Sequence[Query],
    *,
    task: str | None = None,
    length: int | None = None,
    batch_size: int = 16,
) -> list[Retrieval]:
    """One record for each way of pooling (last token, mean), the same on every process.

    `length`: tokens read of each text; None: all.

    Raises:
        DataError: no queries, or a text that is empty or too long for a model.
        ModelError: embeddings that are not finite, naming the text.
    """
    pair = Pair.of(twin)
    if not queries:
        raise DataError("no queries to retrieve with")
    texts = list(dict.fromkeys(text for each in queries for text in (each.query, *each.documents)))
    ids = [text_ids(tokenizer, text, special=True)[:length] for text in texts]
    check_ids(ids, pair.pruned, steps=0)
    batches = batches_of(ids, pair.dense, size=batch_size, steps=0)
    embedded = {view.name: _embed(view, batches, texts) for view in (pair.dense, pair.pruned)}
    place = {text: number for number, text in enumerate(texts)}
    return [
        _retrieval_record(
            pooling, task, queries, place, *(embedded[view.name][pooling] for view in (pair.dense, pair.pruned))
        )
        for pooling in POOLINGS
    ]


def _embed(view: View, batches: list[Batch], texts: list[str]) -> dict[str, Tensor]:
    parts = dist.over(
        batches, lambda mine: [_pooled(view, batch) for batch in console.track(mine, f"embed, {view.name}")]
    )
    found = {pooling: torch.cat([part[pooling] for part in parts]) for pooling in POOLINGS}
    for value_ED in found.values():
        bad_E = ~torch.isfinite(value_ED).all(-1)
        if bad_E.any():
            text = texts[int(bad_E.nonzero()[0])]
            raise ModelError(
                f"the {view.name} view gives an embedding that is not finite for {text[:60]!r}: load the model in "
                "float32 or bfloat16; if it stays so, its weights are damaged"
            )
    return found


def _pooled(view: View, batch: Batch) -> dict[str, Tensor]:
    """Padding is on the left: the last column is the last token of every text."""
    weight_BT1 = batch.mask_BT[..., None].double() / batch.mask_BT.sum(-1)[:, None, None]
    found: dict[str, Tensor] = {}

    def pool(h_BTD: Tensor) -> Tensor:
        found["last"] = h_BTD[:, -1].double().cpu()
        # where, not a product alone: a NaN on padding times 0 stays a NaN
        found["mean"] = torch.where(weight_BT1 > 0, h_BTD.double() * weight_BT1, 0).sum(1).cpu()
        return h_BTD[:, -1]

    with running(view) as model, hidden_states(view, pool):
        model(
            input_ids=batch.ids_BT,
            attention_mask=batch.mask_BT,
            position_ids=positions(batch.mask_BT),
            use_cache=False,
            logits_to_keep=1,
        )
    return found


def _retrieval_record(
    pooling: str,
    task: str | None,
    queries: Sequence[Query],
    place: dict[str, int],
    dense_ED: Tensor,
    pruned_ED: Tensor,
) -> Retrieval:
    correlation, order, first = [], [], []
    relevance: dict[str, list[float]] = {"dense": [], "pruned": []}
    for each in queries:
        rows = [place[text] for text in each.documents]
        scores = {
            name: torch.nn.functional.cosine_similarity(x_ED[place[each.query]][None], x_ED[rows])
            for name, x_ED in (("dense", dense_ED), ("pruned", pruned_ED))
        }
        correlation.append(rank_correlation(scores["dense"], scores["pruned"]))
        order.append(ndcg_of(scores["pruned"], gains_of(scores["dense"])))
        first.append(int(scores["dense"].argmax() == scores["pruned"].argmax()))
        if each.relevant is not None:
            gain_G = torch.zeros(len(rows), dtype=torch.float64)
            gain_G[list(each.relevant)] = 1
            for name, score_G in scores.items():
                relevance[name].append(ndcg_of(score_G, gain_G))
    shapes = dense_ED.shape == pruned_ED.shape
    embedding_E = spaces.one_minus_cosine(dense_ED, pruned_ED) if shapes else torch.empty(0)
    return Retrieval(
        pooling,
        len(queries),
        sum(len(each.documents) for each in queries),
        spaces.quantiles(embedding_E),
        spaces.quantiles(correlation),
        spaces.quantiles(order),
        sum(first) / len(first),
        {name: spaces.quantiles(values) for name, values in relevance.items()} if relevance["dense"] else None,
        task,
    )


def ranks(score_G: Tensor) -> Tensor:
    """Rank of each score from the smallest, 0 first; equal scores share the mean of their ranks."""
    below_G = (score_G[None, :] < score_G[:, None]).sum(-1)
    equal_G = (score_G[None, :] == score_G[:, None]).sum(-1)
    return below_G.double() + (equal_G - 1).double() / 2


def rank_correlation(first_G: Tensor, second_G: Tensor) -> float:
    """Spearman's: Pearson's correlation of the ranks. Scores all equal have no order: 1 if both are, else 0."""
    a_G, b_G = (ranks(x_G) - (len(x_G) - 1) / 2 for x_G in (first_G, second_G))
    length = a_G.norm() * b_G.norm()
    if length == 0:
        return float(torch.equal(a_G, b_G))
    return float((a_G @ b_G) / length)


def gains_of(score_G: Tensor) -> Tensor:
    """The dense ranking as graded relevance, from 0 for its last document to 1 for its first."""
    return ranks(score_G) / (len(score_G) - 1)


def ndcg_of(score_G: Tensor, gain_G: Tensor) -> float:
    """nDCG@10 of the ranking by score."""
    return ndcg(gain_G[torch.argsort(score_G, descending=True, stable=True)].tolist())
