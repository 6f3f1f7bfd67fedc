"""Laws of the collapse counts, against counts made the slow way."""

import random

import pytest

from recover.measure.collapse import agreement, distinct_n, first_divergence, longest_repeat, repetition


def texts(count=60):
    chooser = random.Random(0)
    for _ in range(count):
        yield [chooser.randrange(3) for _ in range(chooser.randrange(14))]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_repetition_counts_ngrams_seen_before(n):
    for ids in texts():
        grams = [tuple(ids[i : i + n]) for i in range(max(0, len(ids) - n + 1))]
        seen = sum(gram in grams[:position] for position, gram in enumerate(grams))
        assert repetition(ids, n) == pytest.approx(seen / len(grams) if grams else 0.0)
        assert repetition(ids, n) + distinct_n(ids, n) == pytest.approx(1.0)


def test_a_loop_repeats_nearly_everything_and_distinct_tokens_nothing():
    assert repetition([7, 8] * 50) == pytest.approx(1 - 2 / 97)
    assert repetition(list(range(100))) == 0.0 == repetition([]) == repetition([1, 1, 1])


def test_longest_repeat_is_the_longest_run_found_twice():
    for ids in texts():
        runs = [
            length
            for length in range(1, len(ids))
            for a in range(len(ids) - length + 1)
            for b in range(a)
            if ids[a : a + length] == ids[b : b + length]
        ]
        assert longest_repeat(ids) == max(runs, default=0)


def test_longest_repeat_of_a_loop_is_its_length_less_one_turn():
    assert longest_repeat([4, 5, 6] * 10) == 27


@pytest.mark.parametrize(
    ("a", "b", "position", "share"),
    [
        ([1, 2, 3], [1, 2, 3], None, 1.0),
        ([], [], None, 1.0),
        ([1, 2, 3], [1, 9, 3], 1, 2 / 3),
        ([1, 2], [1, 2, 3, 4], 2, 0.5),
        ([], [1], 0, 0.0),
    ],
)
def test_divergence_and_agreement(a, b, position, share):
    assert first_divergence(a, b) == first_divergence(b, a) == position
    assert agreement(a, b) == agreement(b, a) == pytest.approx(share)
