"""Scores and masks against references written as loops."""

from __future__ import annotations

import math

import pytest
import torch

from recover.base.errors import PruneError
from recover.prune.depth.scores import angular_distance, block_influence
from recover.prune.matrices import keep_n_m, keep_unstructured, magnitude_score, wanda_score


def lowest(scores: list[float], count: int) -> set[int]:
    """Indices of the `count` lowest scores; of equal ones the lower index goes first."""
    return set(sorted(range(len(scores)), key=lambda index: (scores[index], index))[:count])


def scores_with_ties(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 4, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("columns", "fraction"), [(8, 0.5), (10, 0.3), (100, 0.29), (7, 0.5), (64, 0.6), (33, 0.01)])
def test_unstructured_equals_a_double_loop_and_counts_are_exact(columns, fraction, seed):
    score_OI = scores_with_ties(6, columns, seed)
    keep_OI = keep_unstructured(score_OI, fraction)
    gone = round(fraction * columns)
    for row in range(6):
        dropped = lowest(score_OI[row].tolist(), gone)
        assert len(dropped) == gone
        for column in range(columns):
            assert bool(keep_OI[row, column]) == (column not in dropped)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_n_m_equals_a_double_loop_and_every_group_keeps_n(n, m, seed):
    score_OI = scores_with_ties(5, 4 * m, seed)
    keep_OI = keep_n_m(score_OI, n, m)
    for row in range(5):
        for start in range(0, 4 * m, m):
            dropped = lowest(score_OI[row, start : start + m].tolist(), m - n)
            kept = [bool(keep_OI[row, start + offset]) for offset in range(m)]
            assert kept == [offset not in dropped for offset in range(m)]
            assert sum(kept) == n


def test_n_m_refuses_a_width_that_is_no_whole_number_of_groups():
    with pytest.raises(PruneError, match=r"2:4 needs whole groups of 4 inputs, found 10: use 'unstructured'"):
        keep_n_m(torch.rand(2, 10), 2, 4)


def test_all_scores_equal_drops_the_first():
    assert keep_unstructured(torch.ones(2, 6), 0.5).tolist() == [[False] * 3 + [True] * 3] * 2
    assert keep_n_m(torch.zeros(1, 8), 2, 4).tolist() == [[False, False, True, True] * 2]


def test_weight_scores_equal_the_formula_entry_by_entry():
    weight_OI, norm_I = torch.randn(3, 5), torch.rand(5)
    for row in range(3):
        for column in range(5):
            size = abs(weight_OI[row, column].item())
            assert magnitude_score(weight_OI)[row, column].item() == size
            assert wanda_score(weight_OI, norm_I)[row, column].item() == pytest.approx(size * norm_I[column].item())


@pytest.mark.parametrize("angle", [0.0, 1e-3, 0.3, math.pi / 2, 2.5, math.pi])
def test_distances_of_a_known_angle(angle):
    x = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    y = 7 * torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    assert angular_distance(x, y).item() == pytest.approx(angle / math.pi, abs=1e-7)
    assert block_influence(x, y).item() == pytest.approx(1 - math.cos(angle), abs=1e-12)


def test_distance_in_bfloat16_sees_what_bfloat16_arithmetic_cannot():
    x = torch.full((1, 64), 1.0, dtype=torch.bfloat16)
    y = x.clone()
    y[0, 0] = 1.0078125  # one step of bfloat16
    assert 0 < block_influence(x, y).item() < 1e-5
