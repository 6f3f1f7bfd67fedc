"""Closed-form repair of a cut: what the site before it writes is transformed so that the stream behind it is right.

Without the cut, the stream behind it is the dense one; with it, h' = x + T m, where m is what the last kept site before
the cut adds to the stream x. T is fitted by least squares and folded into the last linear of that site, which costs
nothing afterwards: T (W a + b) = (T W) a + T b.

Shapes: B batch, T tokens, N tokens (B * T), D width, O out features, I in features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import LongTensor, Tensor, nn

from recover.base import console
from recover.base.artifacts import JsonObject
from recover.base.errors import PruneError
from recover.models.arch import Arch, arch_of, linears_of
from recover.models.site import Site
from recover.prune.depth.scores import runs_of
from recover.prune.passes import final_hidden, kl_rows, residual_stream, row_sum, site_at

if TYPE_CHECKING:
    from recover.models.twin import Twin

RIDGE = 1e-2  # added to the Gram matrix, times its own diagonal: every channel of m is trusted up to 1% of its power
HELD_OUT = 4  # every so many-th sample is kept out of the fit, to measure on


def refuse_repair(twin: Twin, kind: str, batches: list[LongTensor]) -> None:
    """Raise PruneError where nothing can be folded in (a norm behind the sublayer), or there is too little text."""
    refuse_norm_behind(arch_of(twin.model), kind)
    samples = sum(len(ids_BT) for ids_BT in batches)
    if samples < 2:
        raise PruneError(
            f"prune.repair: '{kind}' needs samples to fit and others to measure on, found {samples}: raise "
            "prune.calibration.samples"
        )


def refuse_norm_behind(arch: Arch, kind: str) -> None:
    """Raise PruneError for a family of which nothing can be folded in: a norm behind each sublayer, or experts."""
    if arch.norm_behind:
        raise PruneError(
            f"prune.repair: '{kind}' cannot be folded into {arch.model_type}: behind each sublayer it has a norm, "
            "which no matrix passes through. Use prune.repair: none"
        )
    if arch.experts is not None:
        raise PruneError(
            f"prune.repair: '{kind}' cannot be folded into {arch.model_type}: what its experts write goes through "
            "no one matrix. Use prune.repair: none"
        )


def repaired(
    twin: Twin, dropped: frozenset[Site], kind: str, batches: list[LongTensor]
) -> tuple[dict[str, Tensor], JsonObject]:
    """The rewritten weights by parameter name, without those that make it worse, and what the repair brought.

    The record: `kind`, `kept` (whether any weight is rewritten), `kl_before` and `kl_after` (mean KL(dense || pruned) a
    token on held-out samples, of the model as it is used), `tokens_fitted`, `tokens_held_out`, and `cuts`: for each run
    of dropped sites (`dropped`) the `site` before it, the mean square error of the stream behind the cut before and
    after on the fitted tokens, the KL before and after, and whether this rewrite is `kept`. Cuts are repaired one after
    another, each on what those before it give; a repair that does not lower the KL is left out with a warning.

    Source: Shopkhoev et al., "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization",
    arXiv 2505.02819, section 2 (least squares, T merged into the MLP's down projection); the ridge pulls towards T = 1
    here, and `rescale` is their T restricted to a diagonal.
    """
    fit, held_out = _split(batches)
    dense = [final_hidden(twin, ids_BT).cpu() for ids_BT in held_out]
    before = kl = _mean_kl(twin, held_out, dense, dropped)
    weights: dict[str, Tensor] = {}
    cuts = []
    for start, end in console.track(runs_of(dropped), f"repair: {kind}", unit="cut"):
        found, errors = fitted(twin, dropped, kind, fit, weights, start, end)
        with _worn(twin, weights | found):
            after = _mean_kl(twin, held_out, dense, dropped)
        cut = {"site": str(site_at(start - 1)), "dropped": [str(site_at(point)) for point in range(start, end)]}
        cuts.append(cut | errors | {"kl_before": kl, "kl_after": after, "kept": after < kl})
        if after < kl:
            weights, kl = weights | found, after
        else:
            moved = f"KL on held-out text went from {kl:.4g} to {after:.4g}"
            console.warn(f"prune.repair: {cut['site']}: {moved}: this repair is left out")
    record = {"kind": kind, "kept": bool(weights), "kl_before": before, "kl_after": kl}
    return weights, record | {"tokens_fitted": _tokens(fit), "tokens_held_out": _tokens(held_out), "cuts": cuts}


def fitted(
    twin: Twin,
    dropped: frozenset[Site],
    kind: str,
    batches: list[LongTensor],
    weights: dict[str, Tensor],
    start: int,
    end: int,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The rewritten weights before the cut from point `start` to `end`, and the error behind it before and after.

    `weights` are those of the repairs before it.
    """
    name = _last_linear(twin, site_at(start - 1))
    sums = _sums(twin, dropped, weights, batches, name, start, end, diagonal=kind == "rescale")
    return _folded(linears_of(twin.model)[name], name, sums.transform()), sums.errors()


def _split(batches: list[LongTensor]) -> tuple[list[LongTensor], list[LongTensor]]:
    """Samples to fit on, and others to measure on, in batches as large as those given."""
    rows_BT, size = torch.cat(tuple(batches)), len(batches[0])
    out = torch.zeros(len(rows_BT), dtype=torch.bool)
    out[(len(rows_BT) - 1) % HELD_OUT :: HELD_OUT] = True  # the last sample is always one of them
    return list(rows_BT[~out].split(size)), list(rows_BT[out].split(size))  # type: ignore[return-value]


def _tokens(batches: list[LongTensor]) -> int:
    return sum(ids_BT.numel() for ids_BT in batches)


def _mean_kl(twin: Twin, batches: list[LongTensor], dense: list[Tensor], closed: frozenset[Site]) -> float:
    total = 0.0
    for ids_BT, dense_ND in zip(batches, dense, strict=True):
        pruned_ND = final_hidden(twin, ids_BT, closed)
        total += row_sum(twin, kl_rows, dense_ND.to(pruned_ND.device), pruned_ND)
    return total / _tokens(batches)


def _last_linear(twin: Twin, site: Site) -> str:
    arch = arch_of(twin.model)
    sublayer, linears = (
        (arch.attention, arch.attention_linears) if site.part == "attention" else (arch.mlp, arch.mlp_linears)
    )
    return f"{arch.blocks}.{site.block}.{sublayer}.{linears[-1]}"


@dataclasses.dataclass
class _Sums:
    """Least squares of r ~ c o A over tokens, streamed in float64, where o is what the linear puts out.

    T = 1 + A^T. c, by which the block multiplies o before adding it (Granite; else 1), is read off m ~ c o: the stream
    itself is rounded to its own size, which in half precision is much coarser than o.
    """

    diagonal: bool
    gram: Tensor | float = 0.0  # o^T o, (D, D) or its diagonal
    cross: Tensor | float = 0.0  # o^T r
    r_square: float = 0.0
    o_m: float = 0.0
    o_square: float = 0.0
    rows: int = 0

    def add(self, o_ND: Tensor, m_ND: Tensor, r_ND: Tensor) -> None:
        o_ND, m_ND, r_ND = o_ND.double(), m_ND.double(), r_ND.double()
        self.gram = self.gram + (o_ND.square().sum(0) if self.diagonal else o_ND.T @ o_ND)
        self.cross = self.cross + ((o_ND * r_ND).sum(0) if self.diagonal else o_ND.T @ r_ND)
        self.r_square += float(r_ND.square().sum())
        self.o_m += float((o_ND * m_ND).sum())
        self.o_square += float(o_ND.square().sum())
        self.rows += len(o_ND)

    def solution(self) -> Tensor:
        """c A: (D, D), or its diagonal (D,)."""
        gram, cross = torch.as_tensor(self.gram), torch.as_tensor(self.cross)
        power_D = gram if self.diagonal else gram.diagonal()
        ridge_D = RIDGE * power_D + torch.finfo(torch.float64).tiny + 1e-12 * power_D.mean()
        return cross / (gram + ridge_D) if self.diagonal else torch.linalg.solve(gram + ridge_D.diag(), cross)

    def transform(self) -> Tensor:
        """T: (D, D), or its diagonal (D,)."""
        change = self.solution() * (self.o_square / self.o_m)
        return 1 + change if self.diagonal else torch.eye(len(change), dtype=change.dtype).to(change) + change.T

    def errors(self) -> dict[str, float]:
        """Mean square error a token of the stream behind the cut, before and after, on the fitted tokens."""
        gram, cross, a = torch.as_tensor(self.gram), torch.as_tensor(self.cross), self.solution()
        explained = 2 * (a * cross).sum() - (a * (gram * a if self.diagonal else gram @ a)).sum()
        return {
            "error_before": self.r_square / self.rows,
            "error_after": (self.r_square - float(explained)) / self.rows,
        }


def _sums(
    twin: Twin,
    dropped: frozenset[Site],
    weights: dict[str, Tensor],
    batches: list[LongTensor],
    name: str,
    start: int,
    end: int,
    *,
    diagonal: bool,
) -> _Sums:
    """The sums for the linear `name`, which writes point `start`; `end` is where the stream should be the dense one."""
    sums, seen = _Sums(diagonal), []
    for ids_BT in batches:
        dense_ND = residual_stream(twin, ids_BT, (), [end])[end].flatten(0, 1)
        hook = linears_of(twin.model)[name].register_forward_hook(lambda _m, _a, output: seen.append(output))
        try:
            with _worn(twin, weights):
                pruned = residual_stream(twin, ids_BT, dropped, [start - 1, start])
        finally:
            hook.remove()
        before_ND, after_ND = pruned[start - 1].flatten(0, 1).double(), pruned[start].flatten(0, 1).double()
        sums.add(seen.pop().flatten(0, 1), after_ND - before_ND, dense_ND.double() - after_ND)
    return sums


def _folded(linear: nn.Linear, name: str, t: Tensor) -> dict[str, Tensor]:
    """T W, and T b if there is a bias, in the dtype of the layer; multiplied in float64 and rounded once."""
    weight_OI = linear.weight.detach().double()
    found = {f"{name}.weight": t[:, None] * weight_OI if t.dim() == 1 else t @ weight_OI}
    if linear.bias is not None:
        bias_O = linear.bias.detach().double()
        found[f"{name}.bias"] = t * bias_O if t.dim() == 1 else t @ bias_O
    return {key: value.to(linear.weight.dtype) for key, value in found.items()}


@contextmanager
def _worn(twin: Twin, weights: dict[str, Tensor]) -> Iterator[None]:
    """Show these weights in place of the dense ones, which come back on exceptions too."""
    parameters = {name: twin.base.get_parameter(name) for name in weights}
    dense = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = dense[name]
