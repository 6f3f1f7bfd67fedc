"""What the parts of a block do: each sublayer to the residual stream, and each expert of a mixture to the tokens.

What would stand behind a sublayer were it closed or replaced is a counterfactual: it changes one sublayer and nothing
else: its input, and the context that its KV cache remembers, stay the dense model's. So one forward of the dense model
and one of the other, whose blocks are given the dense stream in place of their own, show every counterfactual at once;
each cache then holds keys and values of dense states, at every step. Of experts is counted how many tokens each is
given in both views, on the same text (`routing`).

Shapes: B batch, T tokens, N kept tokens or tokens (B * T), D width, S decoding steps, P experts of a token, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from recover.base.errors import ModelError
from recover.models.arch import (
    arch_of,
    base_of,
    blocks_of,
    cache_in,
    experts_of,
    middle_hooks,
    mixture_in,
    sublayers_in,
    taking_cache,
)
from recover.models.site import Site
from recover.models.twin import Twin
from recover.probe.records import Routing
from recover.probe.trajectory import Trajectory, marked, positions, rows_of, whole
from recover.probe.views import Pair, View, running

CLOSED, REPLACED = "closed", "pruned"
COUNTERFACTUALS = (CLOSED, REPLACED)


@dataclasses.dataclass
class Stream:
    """The residual stream of one block: in front of attention, between the sublayers, and behind the MLP."""

    entering: Tensor
    middle: Tensor
    leaving: Tensor


@dataclasses.dataclass(frozen=True)
class Transition:
    """The stream at one sublayer of the dense model: `before_ND`, which is also what stands behind it if it is closed,
    `after_ND`, and `replaced_ND`: behind it with the other view's sublayer in its place, at the same input and context.
    """

    before_ND: Tensor
    after_ND: Tensor
    replaced_ND: Tensor


def transitions(
    pair: Pair, trajectory: Trajectory, mark_BS: Tensor, *, chunk: int | None = None
) -> dict[Site, Transition]:
    """Every sublayer (dense numbering) at the positions marked, in the order of `trajectory`'s rows.

    `chunk`: so many tokens a forward, with a KV cache of each view between them; the figures do not depend on it.
    """
    ids_BT, mask_BT = whole(trajectory)
    mark_BT = marked(trajectory, mark_BS)
    length = ids_BT.shape[1]
    spans = [slice(start, min(start + (chunk or length), length)) for start in range(0, length, chunk or length)]
    dense, other = _Reader(pair.dense, ids_BT, mask_BT), _Reader(pair.pruned, ids_BT, mask_BT)
    arch, numbered = arch_of(pair.dense.model), zip(pair.dense.numbers, blocks_of(pair.dense.model), strict=True)
    there = {Site(number, part) for number, block in numbered for part in sublayers_in(block, arch)}
    parts = []
    for span in spans:
        here = rows_of(mark_BT[:, span])
        streams = dense.read(span, None, _all)
        parts.append(_transitions(streams, other.read(span, streams, here), here, there))
    if len(parts) == 1:
        return parts[0]
    order_N = _order(mark_BT, spans)
    return {
        site: Transition(*(torch.cat([getattr(part[site], name) for part in parts])[order_N] for name in _FIELDS))
        for site in parts[0]
    }


def _all(h_BTD: Tensor) -> Tensor:
    return h_BTD


_FIELDS = [field.name for field in dataclasses.fields(Transition)]


def _order(mark_BT: Tensor, spans: list[slice]) -> Tensor:
    """From rows gathered span by span to rows text by text."""
    places = [mark_BT[:, span].nonzero() + mark_BT.new_tensor([0, span.start], dtype=torch.long) for span in spans]
    at = torch.cat(places)
    return torch.argsort(at[:, 0] * mark_BT.shape[1] + at[:, 1])


def _transitions(
    dense: dict[int, Stream], other: dict[int, Stream], rows: Callable[[Tensor], Tensor], sites: Collection[Site]
) -> dict[Site, Transition]:
    """Of these sites: `dense` is whole, `other` holds `rows` of it. A block that it lacks hands on its input."""
    found = {}
    for number, here in dense.items():
        entering_ND, middle_ND, leaving_ND = (rows(x) for x in (here.entering, here.middle, here.leaving))
        there = other.get(number)
        middle, leaving = (entering_ND, middle_ND) if there is None else (there.middle, there.leaving)
        found[Site(number, "attention")] = Transition(entering_ND, middle_ND, middle)
        found[Site(number, "mlp")] = Transition(middle_ND, leaving_ND, leaving)
    return {site: transition for site, transition in found.items() if site in sites}


class _Reader:
    """One view reads a text span by span, with a cache of its own."""

    def __init__(self, view: View, ids_BT: Tensor, mask_BT: Tensor) -> None:
        self.view, self.ids_BT, self.mask_BT = view, ids_BT, mask_BT
        self.cache: Any = None

    def read(self, span: slice, given: dict[int, Stream] | None, keep: Callable[[Tensor], Tensor]) -> dict[int, Stream]:
        """What `keep` keeps of the streams over this span; with `given`, each sublayer is given that one instead."""
        mask_BT = self.mask_BT[:, : span.stop]
        with running(self.view) as model, _recording(self.view, given, keep) as streams:
            output = model(
                input_ids=self.ids_BT[:, span],
                attention_mask=mask_BT,
                position_ids=positions(mask_BT)[:, span],
                use_cache=span.stop < self.ids_BT.shape[1] or self.cache is not None,
                logits_to_keep=1,
                **taking_cache(model, self.cache),
            )
        self.cache = cache_in(output)
        return streams


@contextmanager
def _recording(
    view: View, given: dict[int, Stream] | None, keep: Callable[[Tensor], Tensor]
) -> Iterator[dict[int, Stream]]:
    """Forwards inside the body fill the streams given here, but for a twin's closed blocks: they are not run."""
    streams: dict[int, Stream] = {}
    with ExitStack() as stack:
        for number, block in zip(view.numbers, blocks_of(view.model), strict=True):
            seen = _watch(stack, block, view, keep, None if given is None else given[number])
            alone = "mlp" not in sublayers_in(block, arch_of(view.model))
            stack.callback(block.register_forward_hook(_store(streams, number, seen, keep, without_mlp=alone)).remove)
        yield streams


def _watch(
    stack: ExitStack, block: nn.Module, view: View, keep: Callable[[Tensor], Tensor], given: Stream | None
) -> dict[str, Tensor]:
    """What is seen of the block's forward until it leaves: `entering`, and `middle` unless the block is not run."""
    seen: dict[str, Tensor] = {}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen.clear()
        h_BTD = args[0] if args else kwargs["hidden_states"]
        if given is not None:
            h_BTD = given.entering.clone()  # never the dense record itself: what follows may write to it
        seen["entering"] = keep(h_BTD)
        return ((h_BTD, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h_BTD})

    def between(h_BTD: Tensor) -> None:
        seen["middle"] = keep(h_BTD)
        if given is not None:
            h_BTD.copy_(given.middle)  # in place: the block adds the MLP to this very tensor

    stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
    arch = arch_of(view.model)
    if arch.lone:  # it is run where its norm is; where between two sublayers would be is in front of it, or behind

        def runs(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen["middle"] = seen["entering"]

        stack.callback(block.get_submodule(arch.mlp_norms[0]).register_forward_pre_hook(runs).remove)
    else:
        _at_middle(stack, block, view, seen, between)
    return seen


def _store(
    streams: dict[int, Stream],
    number: int,
    seen: dict[str, Tensor],
    keep: Callable[[Tensor], Tensor],
    *,
    without_mlp: bool,
) -> Callable[..., None]:
    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if "middle" in seen:
            leaving = keep(output[0] if isinstance(output, tuple) else output)
            streams[number] = Stream(seen["entering"], leaving if without_mlp else seen["middle"], leaving)

    return leave


def _at_middle(
    stack: ExitStack, block: nn.Module, view: View, seen: dict[str, Tensor], act: Callable[[Tensor], None]
) -> None:
    """Call `act` with the stream between the sublayers: the input of what is run first of the MLP and its norms.

    Of a block that runs both on one input, no module reads that stream. It is made, and what `act` writes to it is
    added to what leaves the block: the MLP's input was another all the same.
    """
    arch = arch_of(view.model)
    if arch.parallel(base_of(view.model).config):
        changed: list[Tensor] = []

        def added(middle_BTD: Tensor) -> None:
            acted = middle_BTD.clone()
            act(acted)
            changed[:] = [acted - middle_BTD]

        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            if not changed:
                return output
            delta = changed.pop()
            return (output[0] + delta, *output[1:]) if isinstance(output, tuple) else output + delta

        for handle in middle_hooks(block, arch, added):
            stack.callback(handle.remove)
        stack.callback(block.register_forward_hook(leave).remove)
        return

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if "middle" not in seen:
            act(args[0])

    for name in (arch.mlp, *arch.mlp_norms):
        stack.callback(block.get_submodule(name).register_forward_pre_hook(hook).remove)


def without(view: View, site: Site) -> View:
    """The view with one sublayer (dense numbering) closed: it runs, so that its cache stays right, and adds nothing.

    Raises ModelError for a block that the view does not have.
    """
    there = dict(zip(view.numbers, blocks_of(view.model), strict=True))
    if site.block not in there or site.part not in sublayers_in(there[site.block], arch_of(view.model)):
        raise ModelError(f"{site}: the {view.name} view has the blocks {list(view.numbers)}; expected one of them")

    @contextmanager
    def enter() -> Iterator[Any]:
        with view.enter() as inside, ExitStack() as stack:
            _close(stack, blocks_of(view.model)[view.numbers.index(site.block)], view, site)
            yield inside

    return View(f"{view.name} without {site}", view.model, enter, view.numbers)


def _close(stack: ExitStack, block: nn.Module, view: View, site: Site) -> None:
    seen: dict[str, Tensor] = {}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.clear()
        seen["entering"] = args[0] if args else kwargs["hidden_states"]

    def between(h_BTD: Tensor) -> None:
        if site.part == "attention":
            h_BTD.copy_(seen["entering"])
        seen["middle"] = h_BTD.clone()

    lone = arch_of(view.model).lone

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        if lone:
            return (seen["entering"], *output[1:]) if isinstance(output, tuple) else seen["entering"]
        if site.part == "attention" or "middle" not in seen:
            return output
        return (seen["middle"], *output[1:]) if isinstance(output, tuple) else seen["middle"]

    stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
    if not lone:
        _at_middle(stack, block, view, seen, between)
    stack.callback(block.register_forward_hook(leave).remove)


@torch.no_grad()
def routing(twin: Twin | Pair, rows: Sequence[list[int]]) -> list[Routing]:
    """One record a block with a mixture (dense numbering), for these texts in token ids; none for a model without."""
    pair = Pair.of(twin)
    dense, pruned = (_tokens_of_experts(view, rows) for view in (pair.dense, pair.pruned))
    return [Routing(block, dense[block], pruned.get(block, [])) for block in dense]


def _tokens_of_experts(view: View, rows: Sequence[list[int]]) -> dict[int, list[int]]:
    """How many tokens each expert of a block was given; a closed block runs none, and is left out."""
    arch, model = arch_of(view.model), base_of(view.model)
    experts = experts_of(model.config)[0]
    counts: dict[int, Tensor] = {}

    def see(block: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            given_E = torch.bincount(output[2].flatten(), minlength=experts)
            counts[block] = counts[block] + given_E if block in counts else given_E

        return hook

    names = arch.experts
    mixed = [] if names is None else [block for block in enumerate(blocks_of(model)) if mixture_in(arch, block[1])]
    handles = [
        block.get_submodule(f"{arch.mlp}.{names.router}").register_forward_hook(see(view.numbers[index]))
        for index, block in mixed
        if names is not None
    ]
    try:
        with view.enter():
            for row in rows if mixed else ():
                model(input_ids=torch.tensor([row], device=model.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return {block: given_E.tolist() for block, given_E in counts.items()}
