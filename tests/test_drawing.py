"""Draws by numbers that only a text and a place in it decide: in proportion, cut where they should be, repeatable."""

import pytest
import torch
from tiny import tiny

from recover.config.recipe import Sampling
from recover.text.decode import Writing, drawn, greedy, keys, nucleus, waits, write

CPU = torch.device("cpu")


def draws(p_V, count, temperature=1.0, top_p=1.0, seed=0):
    """The share of each token among draws of many texts."""
    z_BV = torch.tensor(p_V).log().expand(count, len(p_V))
    token_B = nucleus(temperature, top_p)(z_BV, keys(seed, range(count), CPU), torch.zeros(count, dtype=torch.long))
    return torch.bincount(token_B, minlength=len(p_V)) / count


def test_a_nucleus_holds_the_fewest_tokens_and_is_drawn_in_proportion():
    found_V = draws([0.4, 0.05, 0.3, 0.25], 20000, top_p=0.65)
    torch.testing.assert_close(found_V, torch.tensor([4 / 7, 0, 3 / 7, 0]), atol=0.012, rtol=0)
    assert draws([0.4, 0.05, 0.3, 0.25], 100, temperature=0.01)[0] == 1


def test_tokens_as_likely_as_the_last_of_a_nucleus_belong_to_it():
    found_V = draws([0.2, 0.4, 0.2, 0.2], 20000, top_p=0.5)
    torch.testing.assert_close(found_V, torch.tensor([0.2, 0.4, 0.2, 0.2]), atol=0.012, rtol=0)


@pytest.mark.parametrize(("temperature", "count"), [(0.5, 8000), (1.0, 30000), (3.0, 8000)])
def test_draws_follow_the_distribution_over_texts_and_over_places(temperature, count):
    z_V = 2 * torch.randn(300, generator=torch.Generator().manual_seed(3))
    expected_V = (z_V / temperature).softmax(-1)
    numbers, still = torch.arange(count), torch.zeros(count, dtype=torch.long)
    ways = [(keys(1, range(count), CPU), still), (keys(1, [5], CPU).expand(count, 2), numbers)]
    chance = (expected_V * (1 - expected_V) / count).sqrt().sum() * (2 / torch.pi) ** 0.5  # expected absolute error
    for key_B2, place_B in ways:
        token_B = drawn(z_V.expand(count, 300), key_B2, place_B, temperature, 1.0)
        found_V = torch.bincount(token_B, minlength=300) / count
        assert (found_V - expected_V).abs().sum() < 1.3 * chance


def test_waits_are_exponential_and_independent():
    """By their moments, down to the smallest ones, which decide a race among many."""
    e_BV = waits(keys(0, range(400), CPU), torch.arange(400), 5000).double()
    assert abs(e_BV.mean() - 1) < 0.004 and abs(e_BV.var() - 1) < 0.01
    least_B = e_BV.min(1).values * 5000  # again of that distribution
    assert abs(least_B.mean() - 1) < 0.2
    along, across = (e_BV[:, 1:] - 1) * (e_BV[:, :-1] - 1), (e_BV[1:] - 1) * (e_BV[:-1] - 1)
    assert abs(along.mean()) < 0.004 and abs(across.mean()) < 0.004


def test_keys_differ_by_seed_and_number_and_any_seed_is_taken():
    found = {tuple(row) for seed in (0, 1, 2**60, -1) for row in keys(seed, range(50), CPU).tolist()}
    assert len(found) == 200 and all(0 <= word < 2**32 for row in found for word in row)


def test_of_equal_logits_greedy_takes_the_first():
    assert greedy(torch.tensor([[1.0, 3.0, 3.0]]), torch.zeros(1, 2), torch.zeros(1)).tolist() == [1]


@torch.no_grad()
def test_a_drawn_text_depends_on_its_number_and_not_on_the_rows_beside_it():
    model, sampling = tiny(), Sampling(temperature=1.5, top_p=0.9)
    asked = [[5, 6, 7 + number % 3] for number in range(20)]
    how = Writing(limit=8, ends=(2,), pad=0, rows=20, sampling=sampling, seed=3)
    found = dict(write(model, asked, how))
    for rows in (1, 6):
        assert dict(write(model, asked, Writing(8, (2,), 0, rows, sampling, 3))) == found
    assert len({tuple(found[number]) for number in range(0, 20, 3)}) > 1  # of one prompt
    some = dict(write(model, asked[4:9], Writing(8, (2,), 0, 3, sampling, 3, numbers=(4, 5, 6, 7, 8))))
    assert some == {place: found[4 + place] for place in range(5)}
    assert dict(write(model, asked, Writing(8, (2,), 0, 20, sampling, 4))) != found
