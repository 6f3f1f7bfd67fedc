"""Laws of choices and of retrieval: equal models agree exactly, figures are those worked out by hand."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from probe_reference import endless, prompts, textbook_kl
from tiny import ids

from recover.base.errors import DataError, ModelError
from recover.measure.kinds.choice import margin
from recover.probe import compare
from recover.probe.tasks import (
    Asked,
    Query,
    choice_drift,
    gains_of,
    ndcg_of,
    rank_correlation,
    ranks,
    read_queries,
    retrieval_drift,
)
from recover.probe.views import Pair

QUANTILES = ("mean", "p50", "p90", "p99", "max")


def moved(model, scale=0.03):
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model


def asked(shared: int = 0, count: int = 5) -> list[Asked]:
    """Items of 4 options of one to four tokens, the first `shared` of which all options have in common."""
    items = []
    for number, prompt in enumerate(prompts(count)):
        common = ids(1, 3, seed=50 + number)[0].tolist()[:shared]
        ends = [[20 + number + 31 * option, *ids(1, 3, seed=option)[0].tolist()[:option]] for option in range(4)]
        items.append(Asked(tuple((*prompt, *common, *end) for end in ends), len(prompt), number % 4))
    return items


@torch.no_grad()
def logits(model, row):
    return model(torch.tensor([row])).logits[0].double()


@pytest.mark.parametrize("shared", [0, 2])
def test_choices_are_the_textbook_row_by_row_without_padding(shared):
    dense = endless()
    pruned = moved(dense)
    items = asked(shared)
    record = choice_drift(Pair.of_models(dense, pruned), items, task="mcq", batch_size=8)
    assert (record.task, record.items, record.subspace) == ("mcq", 5, 5)
    drift, whole, mass, right, same, margins = [], [], {"dense": [], "pruned": []}, [], [], []
    for item in items:
        place = item.start + shared - 1
        tokens = [option[place + 1] for option in item.options]
        z, y = (logits(model, item.options[0])[place] for model in (dense, pruned))
        drift.append(textbook_kl(z[tokens][None], y[tokens][None]).item())
        whole.append(textbook_kl(z[None], y[None]).item())
        for name, x in (("dense", z), ("pruned", y)):
            mass[name].append(x.softmax(-1)[tokens].sum().item())
        scores = [
            [
                sum(
                    logits(model, option).log_softmax(-1)[t - 1, option[t]].item()
                    for t in range(item.start, len(option))
                )
                for option in item.options
            ]
            for model in (dense, pruned)
        ]
        margins.append(scores[0][item.label] - max(s for i, s in enumerate(scores[0]) if i != item.label))
        right.append(margins[-1] > 0)
        same.append(np.argmax(scores[0]) == np.argmax(scores[1]))
    close = {"rel": 1e-4, "abs": 1e-7}
    assert record.drift["kl"]["mean"] == pytest.approx(np.mean(drift), **close)
    assert record.vocabulary["kl"]["max"] == pytest.approx(max(whole), **close)
    for name in mass:
        assert record.mass[name]["p50"] == pytest.approx(np.median(mass[name]), **close)
    assert record.likelihood["accuracy"]["dense"] == pytest.approx(np.mean(right))
    assert record.likelihood["same_choice"] == pytest.approx(np.mean(same))
    assert record.likelihood["margin"]["dense"]["mean"] == pytest.approx(np.mean(margins), rel=1e-4)


def test_equal_models_choose_alike_exactly_and_batches_make_no_difference(monkeypatch):
    dense = endless()
    record = choice_drift(Pair.of_models(dense, copy.deepcopy(dense)), asked())
    assert set(record.drift["kl"].values()) == set(record.vocabulary["kl"].values()) == {0.0}
    assert record.same_choice == record.likelihood["same_choice"] == 1 and record.rank_changed == 0
    assert record.margin["dense"] == record.margin["pruned"]
    pair = Pair.of_models(dense, moved(dense))
    expected = choice_drift(pair, asked(), batch_size=100).to_json()
    monkeypatch.setattr(compare, "ELEMENTS", {"cpu": 1})
    found = choice_drift(pair, asked(), batch_size=1).to_json()
    for name in ("drift", "vocabulary", "mass", "margin"):
        for key, value in expected[name].items():
            assert found[name][key] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    assert found["likelihood"]["accuracy"] == expected["likelihood"]["accuracy"]


def test_a_lower_rank_of_the_right_option_shows():
    """The head of the other model swaps two option tokens: the choice among them turns round, the rest stays."""
    dense = endless()
    item = Asked(((5, 6, 7, 40), (5, 6, 7, 41)), 3, 0)
    swapped = copy.deepcopy(dense)
    with torch.no_grad():
        swapped.lm_head.weight[[40, 41]] = swapped.lm_head.weight[[41, 40]]
    record = choice_drift(Pair.of_models(dense, swapped), [item])
    assert record.same_choice == record.likelihood["same_choice"] == 0 and record.rank_changed == 1
    assert record.margin["pruned"]["mean"] == pytest.approx(-record.margin["dense"]["mean"], rel=1e-4)
    assert record.mass["pruned"]["mean"] == pytest.approx(record.mass["dense"]["mean"], rel=1e-5)
    assert {*record.accuracy.values()} == {0.0, 1.0}


@pytest.mark.parametrize(
    "options, expected",
    [
        (((1, 2, 9), (1, 2, 8)), (2, [9, 8])),
        (((1, 5, 7, 9), (1, 5, 7, 8, 3)), (3, [9, 8])),
        (((1, 5, 7), (1, 5, 7, 8)), None),  # one is the beginning of the other
        (((1, 5, 7), (1, 5, 8), (1, 6, 8)), None),  # two of three part from the third only
    ],
)
def test_the_option_tokens_are_where_the_options_part(options, expected):
    assert Asked(options, 1, 0).parting() == expected


def test_items_without_a_token_subspace_are_still_scored_by_likelihood():
    dense = endless()
    record = choice_drift(Pair.of_models(dense, moved(dense)), [Asked(((3, 5, 7), (3, 5, 7, 8)), 1, 1)])
    assert (record.items, record.subspace) == (1, 0)
    assert set(record.drift["kl"].values()) == {None} and record.same_choice is None
    assert record.likelihood["accuracy"]["dense"] in (0.0, 1.0)


def test_margin_is_against_the_best_wrong_option():
    assert margin([-1.0, -3.0, -2.0], 0) == 1.0 and margin([-1.0, -3.0, -2.0], 1) == -2.0


def test_choices_that_cannot_be_probed_are_refused():
    pair = Pair.of_models(endless(), endless())
    with pytest.raises(DataError, match="no items"):
        choice_drift(pair, [])
    with pytest.raises(DataError, match="more than the 256 positions"):
        choice_drift(pair, [Asked(((1,) * 300, (2,) * 300), 1, 0)])
    broken = endless()
    broken.model.embed_tokens.weight.data[77] = float("nan")
    with pytest.raises(ModelError, match="prompt 1, decoding step 0: the pruned view"):
        items = [Asked(((5, 6, 9), (5, 6, 8)), 2, 0), Asked(((5, 77, 9), (5, 77, 8)), 2, 0)]
        choice_drift(Pair.of_models(endless(), broken), items)


# Retrieval


class Letters:
    """Each letter is a token."""

    chat_template = bos_token_id = eos_token_id = None

    def __call__(self, text, **_how):
        return {"input_ids": [ord(letter) % 250 + 3 for letter in text]}


QUERIES = [
    Query("what is a cat", ("a cat is an animal", "rain falls", "the sea is deep", "dogs bark at cats"), (0, 3)),
    Query("rain", ("rain falls", "a cat is an animal", "sun", "snow falls down"), (0,)),
]


def test_retrieval_is_the_textbook_text_by_text_without_padding():
    dense = endless()
    pruned = moved(dense)
    found = {r.pooling: r for r in retrieval_drift(Pair.of_models(dense, pruned), Letters(), QUERIES, batch_size=3)}
    for pooling in ("last", "mean"):
        correlations, drift, texts = [], [], {}
        for query in QUERIES:
            for text in (query.query, *query.documents):
                with torch.no_grad():
                    states = [
                        m.model(torch.tensor([Letters()(text)["input_ids"]]))[0][0].double() for m in (dense, pruned)
                    ]
                texts[text] = [h[-1] if pooling == "last" else h.mean(0) for h in states]
            ask = texts[query.query]
            scores = np.array(
                [
                    [torch.cosine_similarity(a, b, dim=0).item() for a, b in zip(ask, texts[d], strict=True)]
                    for d in query.documents
                ]
            )
            order = scores.argsort(0).argsort(0)
            correlations.append(np.corrcoef(order[:, 0], order[:, 1])[0, 1])
        drift = [1 - torch.cosine_similarity(a, b, dim=0).item() for a, b in texts.values()]
        record = found[pooling]
        assert record.rank_correlation["mean"] == pytest.approx(np.mean(correlations))
        assert record.embedding["mean"] == pytest.approx(np.mean(drift), rel=1e-4)
        assert (record.queries, record.documents) == (2, 8)


def test_equal_models_rank_alike_exactly():
    dense = endless()
    for record in retrieval_drift(Pair.of_models(dense, copy.deepcopy(dense)), Letters(), QUERIES):
        assert set(record.embedding.values()) == {0.0}
        assert record.rank_correlation["mean"] == pytest.approx(1) and record.ndcg["mean"] == pytest.approx(1)
        assert record.top1 == 1 and record.relevance["dense"] == record.relevance["pruned"]
    without = [Query(each.query, each.documents) for each in QUERIES]
    assert retrieval_drift(Pair.of_models(dense, dense), Letters(), without)[0].relevance is None


def test_of_each_text_so_many_tokens_are_read():
    pair = Pair.of_models(endless(), moved(endless()))
    cut = [Query(each.query[:8], tuple(text[:8] for text in each.documents), each.relevant) for each in QUERIES]
    expected = retrieval_drift(pair, Letters(), cut, task="t")
    assert retrieval_drift(pair, Letters(), QUERIES, task="t", length=8) == expected
    assert retrieval_drift(pair, Letters(), QUERIES, task="t") != expected


def test_rank_correlation_and_ndcg_are_those_worked_out_by_hand():
    x = torch.tensor([0.1, 0.4, 0.2, 0.9], dtype=torch.float64)
    assert rank_correlation(x, x.exp()) == pytest.approx(1) and rank_correlation(x, -x) == pytest.approx(-1)
    assert ranks(torch.tensor([5.0, 1.0, 5.0])).tolist() == [1.5, 0, 1.5]
    # ranks 0 2 1 3 against 1 2 0 3: 1 - 6 (1 + 0 + 1 + 0) / (4 * 15)
    assert rank_correlation(x, torch.tensor([0.2, 0.4, 0.1, 0.9], dtype=torch.float64)) == pytest.approx(0.8)
    same = torch.ones(3, dtype=torch.float64)
    assert rank_correlation(same, same) == 1 and rank_correlation(same, torch.arange(3).double()) == 0
    assert gains_of(x).tolist() == pytest.approx([0, 2 / 3, 1 / 3, 1])
    gain = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    assert ndcg_of(torch.tensor([3.0, 2, 1]), gain) == 1
    assert ndcg_of(torch.tensor([1.0, 2, 3]), gain) == pytest.approx(1 / np.log2(4))
    assert ndcg_of(torch.arange(12.0), torch.eye(12, dtype=torch.float64)[0]) == 0  # twelfth: beyond the cut


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "holds no rows"),
        ("{", "r.jsonl:1: not JSON"),
        ('{"query": "a", "documents": ["b"]}', "expected a list of two or more texts"),
        ('{"documents": ["b", "c"]}', "'query': found None"),
        ('{"query": "a", "documents": ["b", "c"], "relevant": [2]}', "indices from 0 to 1"),
    ],
)
def test_queries_that_cannot_be_read_are_refused_by_line(tmp_path, line, message):
    path = tmp_path / "r.jsonl"
    path.write_text(line)
    with pytest.raises(DataError, match=message):
        read_queries(path)
    path.write_text(json.dumps({"query": "a", "documents": ["b", "c"]}))
    assert read_queries(path) == [Query("a", ("b", "c"))]


def test_an_embedding_that_is_not_finite_names_the_text():
    broken = endless()
    broken.model.embed_tokens.weight.data[ord("w") % 250 + 3] = float("nan")
    with pytest.raises(ModelError, match="not finite for 'what is a cat'"):
        retrieval_drift(Pair.of_models(endless(), broken), Letters(), QUERIES)
    with pytest.raises(DataError, match="no tokens"):
        retrieval_drift(Pair.of_models(endless(), endless()), Letters(), [Query("", ("a", "b"))])
