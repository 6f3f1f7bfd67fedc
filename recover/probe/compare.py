"""Hidden states of two views turned into drift, row by row, never holding more than a few rows of logits.

Shapes: N rows (scored positions), D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from recover.errors import ModelError
from recover.models.site import Site
from recover.probe import spaces
from recover.probe.sublayers import CLOSED, REPLACED, Transition
from recover.probe.views import LENSES, Lens, Pair, States

# Logits of one view held at once; some ten times as many numbers live while they are compared. On a CPU they should
# stay in its cache, on a GPU a product with the head should be worth reading the head for.
ELEMENTS = {"cpu": 2**20, "cuda": 2**25}

Table = dict[str, Tensor]  # metric -> one value a row, float64, on the CPU


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which prompt (its number) and which decoding step each row belongs to."""

    prompt_N: Tensor
    step_N: Tensor

    def __getitem__(self, keep: Tensor | slice) -> Rows:
        return Rows(self.prompt_N[keep], self.step_N[keep])

    def __len__(self) -> int:
        return len(self.step_N)


class Comparison:
    """Drift between the two views of a pair. Raises ModelError for two vocabularies, and for non-finite logits."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.dense, self.pruned = Lens(pair.dense), Lens(pair.pruned)
        if self.dense.vocabulary != self.pruned.vocabulary:
            raise ModelError(
                f"probe: the dense view has {self.dense.vocabulary} logits, the pruned view {self.pruned.vocabulary}: "
                "expected two models of one vocabulary"
            )

    def final(
        self, h_dense_ND: Tensor, h_pruned_ND: Tensor, rows: Rows, temperatures: list[float]
    ) -> dict[float, Table]:
        """Every metric at the last layer, by temperature; what does not depend on it is repeated under each."""
        tables = self._by_chunks(lambda h, g, at: self._final(h, g, at, temperatures), h_dense_ND, h_pruned_ND, rows)
        return {t: {name: value for (at, name), value in tables.items() if at in (None, t)} for t in temperatures}

    def _final(self, h_dense_ND: Tensor, h_pruned_ND: Tensor, rows: Rows, temperatures: list[float]) -> dict:
        z_dense_NV = finite_logits(self.dense, h_dense_ND, rows, "dense view")
        z_pruned_NV = finite_logits(self.pruned, h_pruned_ND, rows, "pruned view")
        states = spaces.state_drift(h_dense_ND, h_pruned_ND) if self.pair.one_width else {}
        shared = states | spaces.logit_drift(z_dense_NV, z_pruned_NV)
        table = {(None, name): value for name, value in shared.items()}
        for t in temperatures:
            table |= {(t, name): value for name, value in spaces.probability_drift(z_dense_NV, z_pruned_NV, t).items()}
        return table

    def blocks(self, dense: States, pruned: States, rows: Rows) -> dict[tuple[int, str], Table]:
        """Drift at the output of every block that both views have, through both lenses, T = 1.

        None for two models of different width, whose hidden states have nothing in common.
        """
        numbers = [number for number in dense.blocks if number in pruned.blocks and self.pair.one_width]
        return {
            (number, lens): self._block(dense.blocks[number], pruned.blocks[number], rows, number, lens)
            for number in numbers
            for lens in LENSES
        }

    def _block(self, h_dense_ND: Tensor, h_pruned_ND: Tensor, rows: Rows, number: int, lens: str) -> Table:
        def compare(h_dense_ND: Tensor, h_pruned_ND: Tensor, rows: Rows) -> Table:
            h_dense_ND, h_pruned_ND = self.dense.states(h_dense_ND, lens), self.pruned.states(h_pruned_ND, lens)
            z_dense_NV = finite_logits(self.dense, h_dense_ND, rows, f"dense view after block {number}, {lens} lens,")
            z_pruned_NV = finite_logits(
                self.pruned, h_pruned_ND, rows, f"pruned view after block {number}, {lens} lens,"
            )
            embedding_N = spaces.one_minus_cosine(h_dense_ND.double(), h_pruned_ND.double())
            return {"embedding": embedding_N} | spaces.lens_drift(z_dense_NV, z_pruned_NV)

        return self._by_chunks(compare, h_dense_ND, h_pruned_ND, rows)

    def sublayers(self, found: dict[Site, Transition], rows: Rows) -> dict[tuple[Site, str, str], Table]:
        """Drift that each sublayer makes when it alone is closed, or replaced by the pruned one; keys end in the lens.

        Both states go through the dense model's norm and head. Figures are those of `spaces.sublayer_drift`.
        """
        return {
            (site, what, lens): self._sublayer(found[site].after_ND, changed_ND, rows, f"{site} {what}, {lens} lens,")
            for site in found
            for what, changed_ND in ((CLOSED, found[site].before_ND), (REPLACED, found[site].replaced_ND))
            for lens in LENSES
        }

    def _sublayer(self, after_ND: Tensor, changed_ND: Tensor, rows: Rows, where: str) -> Table:
        lens = where.split()[-2]

        def compare(after_ND: Tensor, changed_ND: Tensor, rows: Rows) -> Table:
            after_ND, changed_ND = self.dense.states(after_ND, lens), self.dense.states(changed_ND, lens)
            z_after_NV = finite_logits(self.dense, after_ND, rows, f"dense view at {where}")
            same = torch.equal(after_ND, changed_ND)  # most sublayers of a depth-pruned model: half the work
            z_changed_NV = (
                z_after_NV if same else finite_logits(self.dense, changed_ND, rows, f"pruned view at {where}")
            )
            return spaces.sublayer_drift(after_ND, changed_ND, z_after_NV, z_changed_NV)

        return self._by_chunks(compare, after_ND, changed_ND, rows)

    def kl(self, h_dense_ND: Tensor, h_pruned_ND: Tensor, rows: Rows) -> Tensor:
        """KL(dense || pruned) of each row, from states after the final norm."""
        return self._kl(self.dense, h_dense_ND, self.pruned, h_pruned_ND, rows)

    def expected(self, lens: Lens, h_ND: Tensor, target_N: Tensor, rows: Rows, name: str) -> Tensor:
        """log p of each row's target token, in nats, at T = 1."""

        def compare(h_ND: Tensor, target_N: Tensor, rows: Rows) -> Table:
            log_p_NV = spaces.log_probabilities(finite_logits(lens, h_ND, rows, f"{name} view"))
            return {"log_p": log_p_NV.gather(-1, target_N[:, None]).squeeze(-1)}

        return self._by_chunks(compare, h_ND, target_N, rows)["log_p"]

    def self_drift(self, view: str, once_ND: Tensor, again_ND: Tensor, rows: Rows) -> dict[str, float]:
        """The largest drift between two readings of one view: no more than rounding, if nothing is wrong."""
        lens = self.dense if view == "dense" else self.pruned
        embedding_N = spaces.one_minus_cosine(once_ND.double(), again_ND.double())
        return {"kl": self._kl(lens, once_ND, lens, again_ND, rows).max().item(), "embedding": embedding_N.max().item()}

    def _kl(self, first: Lens, h_first_ND: Tensor, second: Lens, h_second_ND: Tensor, rows: Rows) -> Tensor:
        def compare(h_first_ND: Tensor, h_second_ND: Tensor, rows: Rows) -> Table:
            z_first_NV = finite_logits(first, h_first_ND, rows, "dense view" if first is self.dense else "pruned view")
            z_second_NV = finite_logits(
                second, h_second_ND, rows, "dense view" if second is self.dense else "pruned view"
            )
            return {"kl": spaces.kl(spaces.log_probabilities(z_first_NV), spaces.log_probabilities(z_second_NV))}

        return self._by_chunks(compare, h_first_ND, h_second_ND, rows)["kl"]

    def _by_chunks(self, compare: Callable[..., dict], h_first_ND: Tensor, h_second_ND: Tensor, rows: Rows) -> dict:
        size = max(1, ELEMENTS[h_first_ND.device.type] // self.dense.vocabulary)
        spans = [slice(start, start + size) for start in range(0, len(rows), size)]
        with torch.no_grad():
            parts = [compare(h_first_ND[span], h_second_ND[span], rows[span]) for span in spans]
        return {name: torch.cat([part[name].double() for part in parts]).cpu() for name in parts[0]}


def finite_logits(lens: Lens, h_ND: Tensor, rows: Rows, where: str) -> Tensor:
    """The logits; raises ModelError naming prompt and step of the first row that holds a NaN or an infinity."""
    z_NV = lens.logits(h_ND)
    bad_N = ~torch.isfinite(z_NV).all(-1)
    if bad_N.any():
        first = int(bad_N.nonzero()[0])
        raise ModelError(
            f"probe: prompt {int(rows.prompt_N[first])}, decoding step {int(rows.step_N[first])}: the {where} gives "
            "logits that are not finite. Load the model in float32 or bfloat16; if it stays so, its weights are damaged"
        )
    return z_NV
