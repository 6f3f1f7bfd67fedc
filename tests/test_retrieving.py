"""Retrieval: embeddings against single texts, rankings and scores against hand counts."""

import numpy as np
import pytest
import torch
from task_folder import make_task
from tiny import tiny
from words import word_tokenizer

from recover.base.errors import ModelError
from recover.config.recipe import Measure
from recover.maths.score import ndcg
from recover.measure.kinds.retrieval import chance_ndcg
from recover.measure.tasks import load_task, measure
from recover.text.likelihood import embeddings

CFG = Measure(tasks=("x",), batch_size=3, sampling=None, samples=2)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral_sliding"])
def test_an_embedding_is_the_mean_of_the_last_hidden_states_of_its_own_text(family):
    model, tokenizer = tiny(family), word_tokenizer(bos=True)
    texts = ["w5", "w9 w8 w7 w6 w5 w4 w3 w20 w21 w22", "w30 w31 w32", "w7 w7"]
    found = embeddings(model, tokenizer, texts, length=6, batch_size=4)
    for text, vector_D in zip(texts, found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"][:6]])
        with torch.no_grad():
            hidden_TD = model(ids, output_hidden_states=True).hidden_states[-1][0].double()
        expected_D = hidden_TD.mean(0) / hidden_TD.mean(0).norm()
        np.testing.assert_allclose(vector_D, expected_D.numpy(), atol=2e-6)


def test_ranking_scores():
    assert ndcg([True, False, False]) == 1.0 == ndcg([True, True, False])
    assert ndcg([False, True, False]) == pytest.approx(1 / np.log2(3))
    assert ndcg([False] * 10 + [True]) == 0.0  # beyond the tenth
    assert ndcg([True, False, True]) == pytest.approx((1 + 0.5) / (1 + 1 / np.log2(3)))


@pytest.mark.parametrize(("documents", "relevant"), [(2, 1), (5, 2), (14, 1)])
def test_chance_is_the_mean_over_random_rankings(documents, relevant):
    rng = np.random.default_rng(0)
    hits = np.arange(documents) < relevant
    drawn = [ndcg(rng.permutation(hits).tolist()) for _ in range(4000)]
    assert chance_ndcg(documents, relevant) == pytest.approx(np.mean(drawn), abs=0.02)


def test_a_text_finds_itself_and_a_model_without_distinctions_finds_nothing(tmp_path):
    rows = [
        {"query": f"w{n} w{n + 1}", "documents": ["w3 w4", f"w{n} w{n + 1}", "w9 w9"], "relevant": [1]}
        for n in (20, 40)
    ]
    task = load_task(make_task(tmp_path, rows, kind="retrieval"))
    model = tiny()
    record, texts = measure(model, word_tokenizer(), [task], CFG)
    found = record["tasks"]["task"]
    assert (found["score"], found["accuracy"], found["items"]) == (1.0, 1.0, 2) and texts == {}
    assert record["headline"]["retrieval"] == 1.0 and found["interval95"][0] < 0.5
    assert found["samples"][0] == {"prompt": "w20 w21", "text": "w20 w21", "expected": "w20 w21", "correct": True}
    model.model.embed_tokens.weight.data[:] = 1.0
    record, _ = measure(model, word_tokenizer(), [task], CFG)
    assert record["tasks"]["task"]["accuracy"] == 0.0 and record["tasks"]["task"]["score"] == 0.5  # last of three


def test_hidden_states_that_are_not_finite_are_refused():
    model = tiny()
    model.model.embed_tokens.weight.data[7] = float("nan")
    with pytest.raises(ModelError, match="task x: the model gives hidden states that are not finite"):
        embeddings(model, word_tokenizer(), ["w7", "w8"], length=4, batch_size=2, title="task x")
