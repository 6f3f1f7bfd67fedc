"""Laws of the collapse counts, against counts made the slow way."""

import random

import pytest

from recover.maths.repeats import (
    CURVE_POINTS,
    agreement,
    distinct_n,
    first_divergence,
    longest_repeat,
    loop,
    loop_start,
    parting,
    repetition,
)


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


@pytest.mark.parametrize(
    ("ids", "start"),
    [
        ([1, 2, 3] * 8, 0),
        ([9, 8, *([1, 2, 3] * 8)], 2),
        ([9, 8, *([1, 2, 3] * 9), 1, 2], 2),
        ([9, 3, *([1, 2, 3] * 8)], 1),
        ([5] * 24, 0),
        ([5] * 23, None),
        ([*range(30), *range(30)], None),
        ([*range(30), *range(30), *range(30)], 0),
        ([7, *range(30), *range(30), *range(30)], 1),
        ([*([1, 2, 3] * 8), 4], None),
        ([1, 2], None),
        ([], None),
    ],
)
def test_where_the_loop_begins_in_which_a_text_ends(ids, start):
    assert loop_start(ids) == start


def test_loops_are_those_that_all_ends_of_texts_show():
    chooser = random.Random(1)
    found = 0
    for _ in range(300):
        turn = [chooser.randrange(4) for _ in range(chooser.randrange(1, 20))]
        ids = [chooser.randrange(4) for _ in range(chooser.randrange(9))] + turn * chooser.randrange(1, 6)
        ids = ids[: len(ids) - chooser.randrange(3)]
        # Every tail, and every turn that it may be made of.
        tails = [
            (period, start)
            for start in range(len(ids) - 23)
            for period in range(1, (len(ids) - start) // 3 + 1)
            if all(ids[at] == ids[at + period] for at in range(start, len(ids) - period))
            and len(ids) - start >= max(3, -(-24 // period)) * period
        ]
        shortest = min(tails, default=(0, None))
        assert loop_start(ids) == shortest[1]
        assert loop(ids) == (None if shortest[1] is None else shortest[::-1])
        found += shortest[1] is not None
    assert found > 60


def test_the_token_by_which_a_share_of_all_texts_has_parted():
    found = parting([3, None, 0, 7, None, 3, 12, None, 5, 9])
    assert found["never"] == pytest.approx(0.3)
    assert (found["p10"], found["p50"], found["p90"]) == (0, 7, None)
    assert found["curve"][:3] == [[0, 1.0], [1, 0.9], [4, pytest.approx(0.7)]]
    assert found["curve"][-1] == [13, pytest.approx(0.3)]
    assert parting([4])["p10"] == parting([4])["p90"] == 4 and parting([None])["curve"] == [[0, 1.0]]
    with pytest.raises(ValueError, match="no texts"):
        parting([])


def test_a_curve_of_many_texts_is_thinned_and_keeps_its_ends():
    positions = [*range(1000), *[None] * 1000]
    curve = parting(positions)["curve"]
    assert len(curve) <= CURVE_POINTS + 1 and curve[0] == [0, 1.0] and curve[-1] == [1000, 0.5]
    for token, share in curve:
        assert share == pytest.approx(sum(at is None or at >= token for at in positions) / 2000)
