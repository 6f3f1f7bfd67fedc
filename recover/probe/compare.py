"""Hidden states of two views turned into drift, row by row, never holding more than a few rows of logits.

Shapes: N rows (scored positions), D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from recover.base.errors import ModelError
from recover.maths import divergence as spaces
from recover.models.site import Site
from recover.probe.sublayers import CLOSED, COUNTERFACTUALS, REPLACED, Transition
from recover.probe.views import LENSES, Lens, Pair, States

# Logits of one view held at once; some ten times as many numbers live while they are compared. On a CPU they should
# stay in its cache, on a GPU a product with the head should be worth reading the head for.
ELEMENTS = {"cpu": 2**20, "cuda": 2**25}

LENS_METRICS = ("logit", "probability", "kl")
SUBLAYER_METRICS = ("embedding", "parallel", "orthogonal", *LENS_METRICS)

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
    """Drift between the two views of a pair. Raises ModelError for two vocabularies, and for non-finite logits.

    Nothing is asked of the device before all that a call needs of it is under way: then it is waited for once or twice.
    """

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.dense, self.pruned = Lens(pair.dense), Lens(pair.pruned)
        self.device = next(pair.dense.model.parameters()).device
        if self.dense.vocabulary != self.pruned.vocabulary:
            raise ModelError(
                f"probe: the dense view has {self.dense.vocabulary} logits, the pruned view {self.pruned.vocabulary}: "
                "expected two models of one vocabulary"
            )

    def final(
        self, h_dense_ND: Tensor, h_pruned_ND: Tensor, rows: Rows, temperatures: list[float]
    ) -> dict[float, Table]:
        """Every metric at the last layer, by temperature; what does not depend on it is repeated under each."""

        def compare(h_dense_ND: Tensor, h_pruned_ND: Tensor, rows: Rows, finite: Finite) -> dict:
            z_dense_NV = finite.checked(self.dense.logits(h_dense_ND), rows, "dense view")
            z_pruned_NV = finite.checked(self.pruned.logits(h_pruned_ND), rows, "pruned view")
            states = spaces.state_drift(h_dense_ND, h_pruned_ND) if self.pair.one_width else {}
            shared = states | spaces.logit_drift(z_dense_NV, z_pruned_NV)
            table = {(None, name): value for name, value in shared.items()}
            for t in temperatures:
                found = spaces.probability_drift(z_dense_NV, z_pruned_NV, t)
                table |= {(t, name): value for name, value in found.items()}
            return table

        tables = self._by_chunks(compare, h_dense_ND, h_pruned_ND, rows)
        return {t: {name: value for (at, name), value in tables.items() if at in (None, t)} for t in temperatures}

    def blocks(self, dense: States, pruned: States, rows: Rows) -> dict[tuple[int, str], Table]:
        """Drift at the output of every block that both views have, through both lenses, T = 1.

        None for two models of different width, whose hidden states have nothing in common.
        """
        numbers = [number for number in dense.blocks if number in pruned.blocks and self.pair.one_width]
        same = equal([(dense.blocks[number], pruned.blocks[number]) for number in numbers])

        def compare(span: slice, rows: Rows, finite: Finite) -> dict:
            found = {}
            for (number, alike), lens in product(zip(numbers, same, strict=True), LENSES):
                where = f"view after block {number}, {lens} lens,"
                h_dense_ND = self.dense.states(dense.blocks[number][span], lens)
                z_dense_NV = finite.checked(self.dense.logits(h_dense_ND), rows, f"dense {where}")
                if alike and self.pair.one_model:
                    found |= {(number, lens, name): _zeros(rows, h_dense_ND) for name in ("embedding", *LENS_METRICS)}
                    continue
                h_pruned_ND = self.pruned.states(pruned.blocks[number][span], lens)
                z_pruned_NV = finite.checked(self.pruned.logits(h_pruned_ND), rows, f"pruned {where}")
                table = {"embedding": spaces.one_minus_cosine(h_dense_ND.double(), h_pruned_ND.double())}
                table |= spaces.lens_drift(z_dense_NV, z_pruned_NV)
                found |= {(number, lens, name): value for name, value in table.items()}
            return found

        return _tables(self._spans(compare, rows)) if numbers else {}

    def sublayers(self, found: dict[Site, Transition], rows: Rows) -> dict[tuple[Site, str, str], Table]:
        """Drift that each sublayer makes when it alone is closed, or replaced by the pruned one; keys end in the lens.

        Both states go through the dense model's norm and head. Figures are those of `spaces.stream_drift` and
        `spaces.lens_drift`. What stands behind one sublayer is what the next one reads, and what replaces a sublayer
        that was not pruned is that sublayer: of equal states the logits are made once.
        """
        sites = list(found)
        behind = [found[site].after_ND for site in sites]
        read = equal([(found[site].before_ND, after_ND) for site, after_ND in zip(sites[1:], behind, strict=False)])
        same = equal([(found[site].replaced_ND, found[site].after_ND) for site in sites])
        continues, alike = dict(zip(sites[1:], read, strict=True)), dict(zip(sites, same, strict=True))

        def compare(span: slice, rows: Rows, finite: Finite) -> dict:
            table = {}
            for lens in LENSES:
                before: Place | None = None
                for site in sites:
                    here, where = found[site], f"view at {site} {{}}, {lens} lens,"
                    if before is None or not continues[site]:
                        before = self._place(here.before_ND[span], lens, rows, finite, f"pruned {where.format(CLOSED)}")
                    after = self._place(here.after_ND[span], lens, rows, finite, f"dense {where.format(CLOSED)}")
                    figures = {CLOSED: after.drift(before)}
                    if alike[site]:
                        figures[REPLACED] = {name: _zeros(rows, after.h_ND) for name in SUBLAYER_METRICS}
                    else:
                        name = f"pruned {where.format(REPLACED)}"
                        figures[REPLACED] = after.drift(self._place(here.replaced_ND[span], lens, rows, finite, name))
                    for what, each in figures.items():
                        table |= {(site, what, lens, name): value for name, value in each.items()}
                    before = after
            return table

        tables = _tables(self._spans(compare, rows)) if sites else {}
        return {key: tables[key] for key in product(sites, COUNTERFACTUALS, LENSES)}

    def _place(self, h_ND: Tensor, lens: str, rows: Rows, finite: Finite, where: str) -> Place:
        h_ND = self.dense.states(h_ND, lens)
        return Place(h_ND, spaces.Distribution.of(finite.checked(self.dense.logits(h_ND), rows, where)))

    def kl(self, h_dense_ND: Tensor, h_pruned_ND: Tensor, rows: Rows) -> Tensor:
        """KL(dense || pruned) of each row, from states after the final norm."""
        return self._kl(self.dense, h_dense_ND, self.pruned, h_pruned_ND, rows)

    def expected(self, lens: Lens, h_ND: Tensor, target_N: Tensor, rows: Rows, name: str) -> Tensor:
        """log p of each row's target token, in nats, at T = 1."""

        def compare(h_ND: Tensor, target_N: Tensor, rows: Rows, finite: Finite) -> Table:
            log_p_NV = spaces.log_probabilities(finite.checked(lens.logits(h_ND), rows, f"{name} view"))
            return {"log_p": log_p_NV.gather(-1, target_N[:, None]).squeeze(-1)}

        return self._by_chunks(compare, h_ND, target_N, rows)["log_p"]

    def self_drift(self, view: str, once_ND: Tensor, again_ND: Tensor, rows: Rows) -> dict[str, float]:
        """The largest drift between two readings of one view: no more than rounding, if nothing is wrong."""
        lens = self.dense if view == "dense" else self.pruned
        embedding_N = spaces.one_minus_cosine(once_ND.double(), again_ND.double())
        return {"kl": self._kl(lens, once_ND, lens, again_ND, rows).max().item(), "embedding": embedding_N.max().item()}

    def _kl(self, first: Lens, h_first_ND: Tensor, second: Lens, h_second_ND: Tensor, rows: Rows) -> Tensor:
        names = ["dense view" if lens is self.dense else "pruned view" for lens in (first, second)]

        def compare(h_first_ND: Tensor, h_second_ND: Tensor, rows: Rows, finite: Finite) -> Table:
            z_first_NV = finite.checked(first.logits(h_first_ND), rows, names[0])
            z_second_NV = finite.checked(second.logits(h_second_ND), rows, names[1])
            return {"kl": spaces.kl(spaces.log_probabilities(z_first_NV), spaces.log_probabilities(z_second_NV))}

        return self._by_chunks(compare, h_first_ND, h_second_ND, rows)["kl"]

    def _by_chunks(self, compare: Callable[..., dict], first_ND: Tensor, second_ND: Tensor, rows: Rows) -> dict:
        return self._spans(lambda span, *rest: compare(first_ND[span], second_ND[span], *rest), rows)

    def _spans(self, compare: Callable[..., dict], rows: Rows) -> dict:
        """`compare(span, rows, finite)` of a few rows at a time, put together in float64 on the CPU.

        Raises ModelError where logits were not finite.
        """
        size = max(1, ELEMENTS[self.device.type] // self.dense.vocabulary)
        spans = [slice(start, start + size) for start in range(0, len(rows), size)]
        finite = Finite()
        with torch.no_grad():
            parts = [compare(span, rows[span], finite) for span in spans]
            finite.require()
            return to_host({name: torch.cat([part[name].double() for part in parts]) for name in parts[0]})


@dataclasses.dataclass(frozen=True)
class Place:
    """One place of the dense residual stream, seen through a lens: what the head is given, and what it makes of it."""

    h_ND: Tensor
    seen: spaces.Distribution

    def drift(self, changed: Place) -> Table:
        """The figures of another state in the place of this one."""
        return spaces.stream_drift(self.h_ND, changed.h_ND) | self.seen.drift(changed.seen)


class Finite:
    """Logits that have to be finite; whether they are is asked once for all of them, at the end."""

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, Rows, str]] = []

    def checked(self, z_NV: Tensor, rows: Rows, where: str) -> Tensor:
        """The logits as they are. A NaN is the least and the largest of its row."""
        low_N, high_N = z_NV.aminmax(dim=-1)
        self._seen.append((~(torch.isfinite(low_N) & torch.isfinite(high_N)), rows, where))
        return z_NV

    def require(self) -> None:
        """Raises ModelError naming prompt and step of the first row that held a NaN or an infinity."""
        bad = torch.stack([bad_N.any() for bad_N, _, _ in self._seen]).tolist() if self._seen else []
        if not any(bad):
            return
        bad_N, rows, where = self._seen[bad.index(True)]
        first = int(bad_N.nonzero()[0])
        raise ModelError(
            f"probe: prompt {int(rows.prompt_N[first])}, decoding step {int(rows.step_N[first])}: the {where} gives "
            "logits that are not finite. Load the model in float32 or bfloat16; if it stays so, its weights are damaged"
        )


def equal(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[bool]:
    """Whether the tensors of each pair, of one shape, are equal; the device is waited for once."""
    return torch.stack([(first == second).all() for first, second in pairs]).tolist() if pairs else []


def to_host(table: dict[Any, Tensor]) -> dict[Any, Tensor]:
    """The table, whose columns have one length, on the CPU, in one transfer."""
    if not table:
        return table
    columns = torch.stack(list(table.values())).cpu()
    return {name: column.clone() for name, column in zip(table, columns, strict=True)}  # each is sent and stored alone


def _zeros(rows: Rows, like: Tensor) -> Tensor:
    return torch.zeros(len(rows), dtype=torch.float64, device=like.device)


def _tables(columns: dict[tuple[Any, ...], Tensor]) -> dict[Any, Table]:
    """{(*key, name): column} as {key: {name: column}}."""
    tables: dict[Any, Table] = {}
    for (*key, name), column in columns.items():
        tables.setdefault(tuple(key), {})[name] = column
    return tables
