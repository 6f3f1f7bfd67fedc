"""SparseGPT's arithmetic against the printed formula, the inverse anew for every column, and a surgeon's knife."""

from __future__ import annotations

import pytest
import torch

from recover.base.errors import PruneError
from recover.prune import matrices
from recover.prune.matrices import keep_highest


def by_columns(weight_OI, hessian_II, gone_OI):
    """SparseGPT's formula as the paper prints it: the inverse anew for every column, in fp64."""
    weight_OI, hessian_II = weight_OI.double().clone(), hessian_II.double()
    for column in range(weight_OI.shape[1]):
        inverse = torch.linalg.inv(hessian_II[column:, column:])
        for row in range(len(weight_OI)):
            if gone_OI[row, column]:
                weight_OI[row, column:] -= weight_OI[row, column] / inverse[0, 0] * inverse[0]
                weight_OI[row, column] = 0
    return weight_OI


def problem(rows: int = 6, columns: int = 24, tokens: int = 200, seed: int = 0):
    """A weight, correlated inputs, and the damped Hessian behind `damped_inverse`."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x_NI = torch.randn(tokens, columns, generator=generator) @ mix
    hessian_II = x_NI.T @ x_NI
    damped_II = hessian_II + 0.01 * hessian_II.diagonal().mean() * torch.eye(columns)
    return torch.randn(rows, columns, generator=generator), x_NI, hessian_II, damped_II


def given(gone_OI):
    return lambda start, score_GO: gone_OI.T[start : start + len(score_GO)]


@pytest.mark.parametrize(("group", "step"), [(1, 1), (1, 5), (8, 8), (24, 24), (10, 10)])
def test_with_a_given_mask_it_is_the_formula_column_by_column(group, step):
    weight_OI, _, hessian_II, damped_II = problem()
    gone_OI = torch.rand(weight_OI.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    found_IO = weight_OI.T.contiguous()
    factor_II = matrices.damped_inverse(hessian_II, "here", factor=True)
    keep_IO = matrices.rewrite(found_IO, factor_II, given(gone_OI), group=group, step=step)
    assert torch.equal(keep_IO.T, ~gone_OI)
    torch.testing.assert_close(found_IO.T.double(), by_columns(weight_OI, damped_II, gone_OI), rtol=1e-3, atol=1e-4)


def test_the_factor_is_the_cholesky_of_the_inverse():
    _, _, hessian_II, damped_II = problem()
    expected = torch.linalg.cholesky(torch.linalg.inv(damped_II.double()), upper=True)
    torch.testing.assert_close(
        matrices.damped_inverse(hessian_II, "here", factor=True).double(), expected, rtol=1e-3, atol=1e-5
    )


def surgeon(weight_OI, hessian_II, gone: int):
    """Optimal Brain Surgeon: in each row the weight of least loss goes, all others make up for it, and so on."""
    weight_OI = weight_OI.double().clone()
    for row_I in weight_OI:
        left = list(range(len(row_I)))
        for _ in range(gone):
            inverse = torch.linalg.inv(hessian_II.double()[left][:, left])
            losses = row_I[left].square() / inverse.diagonal()
            worst = int(losses.argmin())
            row_I[left] -= row_I[left[worst]] / inverse[worst, worst] * inverse[worst]
            row_I[left.pop(worst)] = 0
    return weight_OI


@pytest.mark.parametrize("seed", range(3))
def test_its_error_lies_between_the_surgeons_and_wandas(seed):
    weight_OI, x_NI, hessian_II, damped_II = problem(seed=seed)

    def error(pruned_OI) -> float:
        return float((x_NI.double() @ (pruned_OI.double() - weight_OI.double()).T).square().sum())

    found_IO = weight_OI.T.contiguous()
    choose = matrices.choose_share(0.5, 24, [len(weight_OI)])
    keep_IO = matrices.rewrite(found_IO, matrices.damped_inverse(hessian_II, "h", factor=True), choose, group=8, step=8)
    wanda = weight_OI * keep_highest(weight_OI.abs() * x_NI.norm(dim=0), 12)
    magnitude = weight_OI * keep_highest(weight_OI.abs(), 12)
    assert int((~keep_IO).sum()) == weight_OI.numel() // 2 and not found_IO[~keep_IO].any()
    best = error(surgeon(weight_OI, damped_II, 12))
    assert best < error(found_IO.T) < min(error(wanda), error(magnitude))


def test_exact_counts_in_every_layer_whatever_the_groups_and_ties():
    sizes, inputs, fraction = [3, 5], 10, 0.37
    choose = matrices.choose_share(fraction, inputs, sizes)
    weight_IO = torch.ones(inputs, sum(sizes))
    keep_IO = matrices.rewrite(weight_IO, torch.eye(inputs), choose, group=4, step=4)
    gone = [int((~keep).sum()) for keep in keep_IO.split(sizes, dim=1)]
    assert gone == [round(fraction * inputs * size) for size in sizes]


def test_a_hessian_that_cannot_be_inverted_gets_more_damping_said_aloud_or_is_refused(capsys):
    bad_II = torch.eye(4) * 10
    bad_II[0, 1] = bad_II[1, 0] = 10.3  # eigenvalue -0.3: 1% is too little, 10% is enough
    factor_II = matrices.damped_inverse(bad_II, "layer x", factor=True)
    torch.testing.assert_close(factor_II.T @ factor_II @ (bad_II + torch.eye(4)), torch.eye(4), rtol=1e-4, atol=1e-4)
    assert "layer x: the Hessian with damping 0.01 cannot be inverted" in capsys.readouterr().err
    with pytest.raises(PruneError, match=r"layer x: the Hessian .* cannot be inverted, even with damping 1.0"):
        matrices.damped_inverse(-torch.eye(4) + 2 * torch.ones(4, 4).fill_diagonal_(1), "layer x", factor=True)
    unseen_II = torch.zeros(3, 3)
    assert matrices.damped_inverse(unseen_II, "y", factor=True).isfinite().all()
