"""The calibration text in the model: what a pass over one batch shows, and the text carried through block by block.

A pass gives the residual stream, the final hidden states, and what they make. `Stream` carries the text through the
model once, so that each block sees what the pruned ones before it give. Nothing of a block's call is guessed. One pass
in which every block hands its input on shows the arguments that each of them gets (masks, positions), which do not
depend on hidden states; then each block is called with its own.

Shapes: B batch, T tokens, N tokens (B * T), D width, V vocabulary, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import LongTensor, Tensor, nn

from recover.base.errors import PruneError
from recover.maths.divergence import kl, log_probabilities, var_p, widen
from recover.models.arch import arch_of, blocks_of, final_norm_of, head_of, linears_of, middle_hooks, sublayers_in
from recover.models.experts import ExpertMatrix, expert_matrices
from recover.models.site import SUBLAYERS, Site
from recover.models.stored_weights import present
from recover.prune.calibrate import check_context

if TYPE_CHECKING:
    from recover.models.twin import Twin

TOKENS = 512  # token positions whose logits are held at once
NO_TARGET = -100  # cross_entropy's mark for positions without a next token

LogitMeasure = Callable[[Tensor, Tensor], Tensor]  # (z_dense_NV, z_pruned_NV) -> one value a row


def point_of(site: Site) -> int:
    """The point of the residual stream that a site reads; it writes the next one. Point 2 b is the input of block b."""
    return 2 * site.block + SUBLAYERS.index(site.part)


def site_at(point: int) -> Site:
    """The site that reads this point of the residual stream."""
    return Site(point // 2, SUBLAYERS[point % 2])


def final_hidden(twin: Twin, ids_BT: LongTensor, closed: Iterable[int | Site] = ()) -> Tensor:
    """Hidden states after the final norm, (N, D), with exactly `closed` closed."""
    seen: list[Tensor] = []

    def see(_module: nn.Module, _args: Any, output: Tensor) -> None:
        seen.append(output)

    with torch.no_grad():
        run(twin, ids_BT, closed, [final_norm_of(twin.model).register_forward_hook(see)])
    return seen[0].flatten(0, 1)


def block_inputs(twin: Twin, ids_BT: LongTensor, closed: Iterable[int | Site] = ()) -> list[Tensor]:
    """The residual stream (B, T, D) at the input of every block and, last, of the final norm."""
    blocks = len(blocks_of(twin.model))
    seen = residual_stream(twin, ids_BT, closed, range(0, 2 * blocks + 1, 2))
    return [seen[2 * block] for block in range(blocks + 1)]


@torch.no_grad()
def residual_stream(
    twin: Twin, ids_BT: LongTensor, closed: Iterable[int | Site] = (), points: Iterable[int] | None = None
) -> dict[int, Tensor]:
    """The residual stream (B, T, D) at these points (`point_of`), or at all: 2 blocks + 1, the last before the norm."""
    seen: dict[int, Tensor] = {}
    wanted = set(range(2 * len(blocks_of(twin.model)) + 1) if points is None else points)
    run(twin, ids_BT, closed, stream_hooks(twin, seen, wanted))
    return seen


def stream_hooks(twin: Twin, seen: dict[int, Tensor], wanted: set[int]) -> list[Any]:
    """Hooks that put the wanted points of the residual stream into `seen` as a forward passes them."""
    arch, blocks = arch_of(twin.model), blocks_of(twin.model)
    whole = set(blocks)

    def see(point: int) -> Any:
        # The first module of an MLP that runs reads the stream itself: the norm before it, or it (OLMo 2).
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            if point in wanted:
                seen.setdefault(point, args[0])
            if module in whole and module.closed and point + 1 in wanted:
                seen[point + 1] = args[0]  # a closed block runs none of its modules, and hands its input on

        return hook

    def behind(point: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            if point in wanted:
                seen[point] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [final_norm_of(twin.model).register_forward_pre_hook(see(2 * len(blocks)))]
    for index, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(see(2 * index)))
        if arch.lone:  # the sublayer that is not there does nothing to the stream
            alone = sublayers_in(block, arch) == ("mlp",)
            middle = (
                block.register_forward_pre_hook(see(2 * index + 1))
                if alone
                else block.register_forward_hook(behind(2 * index + 1))
            )
            hooks.append(middle)
            continue
        if arch.parallel(twin.base.config):
            hooks += middle_hooks(block, arch, lambda h_BTD, point=2 * index + 1: seen.setdefault(point, h_BTD))
            continue
        for name in (*arch.mlp_norms, arch.mlp):
            hooks.append(block.get_submodule(name).register_forward_pre_hook(see(2 * index + 1)))
    return hooks


def run(twin: Twin, ids_BT: LongTensor, closed: Iterable[int | Site], hooks: list[Any]) -> None:
    """One pass with exactly `closed` closed and the given hooks, which are removed after it."""
    try:
        with twin.closed(set(closed)):
            # One position of logits: full logits would be the largest tensor of the pass, and nobody reads them.
            twin.model(input_ids=ids_BT.to(twin.model.device), use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()


def kl_rows(z_dense_NV: Tensor, z_pruned_NV: Tensor) -> Tensor:
    """KL(dense || pruned) of each row, T = 1."""
    return kl(log_probabilities(z_dense_NV), log_probabilities(z_pruned_NV))


def variance_rows(z_dense_NV: Tensor, z_pruned_NV: Tensor) -> Tensor:
    """Var_p(dz) / 2 of each row: KL(dense || pruned) to second order.

    Source: He et al., "Demystifying When Pruning Works via Representation Hierarchies", arXiv 2603.24652, theorem 3.
    """
    return var_p(log_probabilities(z_dense_NV), widen(z_pruned_NV) - widen(z_dense_NV)) / 2


@torch.no_grad()
def row_sum(twin: Twin, rows: LogitMeasure, dense_ND: Tensor, pruned_ND: Tensor) -> float:
    """Sum over tokens of a measure of both views' logits, from final hidden states; TOKENS rows of logits at once."""
    head = head_of(twin.model).ready()
    total = torch.zeros((), dtype=torch.float64, device=dense_ND.device)
    for dense, pruned in zip(dense_ND.split(TOKENS), pruned_ND.split(TOKENS), strict=True):
        total += rows(head.logits(dense), head.logits(pruned)).double().sum()
    return float(total)


def next_tokens(ids_BT: LongTensor) -> Tensor:
    """(N,) The token that each position has to say; NO_TARGET at the end of a sample."""
    return nn.functional.pad(ids_BT[:, 1:], (0, 1), value=NO_TARGET).flatten()


@torch.no_grad()
def nll_sum(twin: Twin, hidden_ND: Tensor, targets_N: Tensor) -> float:
    """Sum over targets of -log p(target), from final hidden states."""
    head = head_of(twin.model).ready()
    total = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
    for hidden, targets in zip(hidden_ND.split(TOKENS), targets_N.to(hidden_ND.device).split(TOKENS), strict=True):
        total += nn.functional.cross_entropy(
            head.logits(hidden), targets, ignore_index=NO_TARGET, reduction="sum"
        ).double()
    return float(total)


HIDDEN_SHARE = 0.25  # of the accelerator's free memory: hidden states that take more stay in main memory

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a block is called with beside the hidden states


class Stream:
    """The residual stream of all calibration batches at the input of one block, and the means to go on to the next.

    Work is done on the model's device; if that is the CPU and there is an accelerator, there, with one block on it at a
    time. Raises PruneError without batches, and for samples longer than the model's context.
    """

    def __init__(self, twin: Twin, batches: Sequence[LongTensor]) -> None:
        if not batches:
            raise PruneError("prune.calibration: no text; scores are measured on text: give at least one sample")
        check_context(twin.model, batches)
        self.blocks = blocks_of(twin.model)
        self.linears: list[dict[str, Any]] = [_inside(block, masked_layers(twin.model)) for block in self.blocks]
        self.device = working_device(twin.model.device)
        self.hidden, self.calls = _entrance(twin, batches, self.device)

    @contextmanager
    def resident(self, index: int) -> Iterator[dict[str, nn.Linear]]:
        """The linear layers of one block by name, the block being on the working device; it is put back unchanged."""
        tensors = [*self.blocks[index].parameters(), *self.blocks[index].buffers()]
        before = [tensor.data for tensor in tensors]
        try:
            with present(*tensors):
                for tensor in tensors:
                    tensor.data = tensor.data.to(self.device)
                yield self.linears[index]
        finally:
            for tensor, data in zip(tensors, before, strict=True):
                tensor.data = data

    def measure(self, index: int, measure: Callable[[Tensor], Tensor], *, advance: bool = False) -> dict[str, Tensor]:
        """Sum over batches of `measure(x_NI)` for the inputs of each linear layer of the block.

        Of a matrix of experts, those of each expert's tokens: (E, ...), 0 for one that sees none.

        Layers that are given the same tensor share one sum. With `advance` the block's outputs become the stream;
        without, a pass ends when the last layer's input is known. Raises PruneError for a layer that is never run.
        """
        layers = self.linears[index]
        experts = {name: layer for name, layer in layers.items() if isinstance(layer, ExpertMatrix)}
        plain = {name: layer for name, layer in layers.items() if name not in experts}
        watch = _Watch(plain, measure, stop=not advance and not experts)
        with watch, _experts_watched(experts, measure) as sums:
            self._run(index, advance=advance)
        return watch.sums() | sums

    def advance(self, index: int, weights: Mapping[str, Tensor]) -> None:
        """Go through the block with these weights (O, I) in the place of its own."""
        with ExitStack() as stack:
            for name, weight_OI in weights.items():
                layer = self.linears[index][name]
                inside = layer.replaced(weight_OI) if isinstance(layer, ExpertMatrix) else _replaced(layer, weight_OI)
                stack.enter_context(inside)
            self._run(index, advance=True)

    @torch.no_grad()
    def _run(self, index: int, *, advance: bool) -> None:
        for batch, hidden_BTD in enumerate(self.hidden):
            arguments, options = self.calls[batch][index]
            with suppress(_Enough):
                output = self.blocks[index](hidden_BTD.to(self.device), *arguments, **options)
                if advance:
                    output_BTD = output[0] if isinstance(output, tuple) else output
                    self.hidden[batch] = output_BTD.to(hidden_BTD.device)


def working_device(device: torch.device) -> torch.device:
    """Where to compute for a model on `device`: there, or on the accelerator if the model is in main memory."""
    return torch.device("cuda") if device.type == "cpu" and torch.cuda.is_available() else device


def masked_layers(model: nn.Module) -> dict[str, Any]:
    """What masks are made for: every linear layer of a twin's model, and every matrix of experts."""
    return {**linears_of(model), **expert_matrices(model)}


def _inside(block: nn.Module, layers: dict[str, Any]) -> dict[str, Any]:
    modules = {id(module) for module in block.modules()}
    return {name: layer for name, layer in layers.items() if id(getattr(layer, "experts", layer)) in modules}


@contextmanager
def _replaced(linear: nn.Linear, weight_OI: Tensor) -> Iterator[None]:
    before = linear.weight.data
    try:
        linear.weight.data = weight_OI
        yield
    finally:
        linear.weight.data = before


@contextmanager
def _experts_watched(
    layers: Mapping[str, ExpertMatrix], measure: Callable[[Tensor], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Inside, what each expert's tokens put into its matrices is summed up, by the name of the matrix."""
    sums: dict[str, Tensor] = {}

    def add(where: str, layer: ExpertMatrix) -> Callable[[str, int, Tensor], None]:
        def take(name: str, expert: int, x_SI: Tensor) -> None:
            if name != layer.name:
                return
            measured = measure(x_SI.detach())
            if where not in sums:
                sums[where] = measured.new_zeros(layer.count, *measured.shape)
            sums[where][expert] += measured

        return take

    takes = [add(where, layer) for where, layer in layers.items()]
    experts = {id(layer.experts): layer.experts for layer in layers.values()}
    try:
        for each in experts.values():
            each.take = lambda *seen: [take(*seen) for take in takes]  # type: ignore[assignment, func-returns-value]
        yield sums
    finally:
        for each in experts.values():
            each.take = None


@torch.no_grad()
def _entrance(twin: Twin, batches: Sequence[LongTensor], device: torch.device) -> tuple[list[Tensor], list[list[Call]]]:
    """Hidden states at the input of the first block, and every block's arguments, batch by batch."""
    placed = _Placed(device)
    hidden: list[Tensor] = []
    calls: list[list[Call]] = []

    def see(_module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if not calls[-1]:
            hidden.append(arguments[0])
        calls[-1].append((placed.tree(arguments[1:]), placed.tree(options)))

    with _handing_on(twin, batches[0]) as blocks:
        handles = [block.register_forward_pre_hook(see, with_kwargs=True) for block in blocks]
        try:
            for ids_BT in batches:
                calls.append([])
                twin.model(input_ids=ids_BT.to(twin.model.device), use_cache=False, logits_to_keep=1)
                placed.forget_sources()
        finally:
            for handle in handles:
                handle.remove()
    bytes_in_all = sum(hidden_BTD.nbytes for hidden_BTD in hidden)
    if device.type == "cpu" or bytes_in_all > HIDDEN_SHARE * torch.cuda.mem_get_info(device)[0]:
        return hidden, calls
    return [hidden_BTD.to(device) for hidden_BTD in hidden], calls


@contextmanager
def _handing_on(twin: Twin, ids_BT: LongTensor) -> Iterator[nn.ModuleList]:
    """Every block closed, the first too: what forbids that is a KV cache, and here there is none.

    The first block runs once on one token, since a closed block learns from an open one what an output looks like.
    """
    blocks, before = blocks_of(twin.model), twin.closed_sites
    try:
        twin.close(range(1, len(blocks)))
        twin.model(input_ids=ids_BT[:1, :1].to(twin.model.device), use_cache=False)
        for block in blocks:
            block.closed = True  # type: ignore[assignment]
        yield blocks
    finally:
        twin.close(before)


class _Placed:
    """Argument tensors on the working device; equal ones, of other blocks and batches, are held once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.held: list[Tensor] = []
        self.sources: dict[int, tuple[Tensor, Tensor]] = {}

    def tree(self, value: Any) -> Any:
        """The value with every tensor in it placed."""
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, dict):
            return {key: self.tree(part) for key, part in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self.tree(part) for part in value)
        return value

    def forget_sources(self) -> None:
        """End of a batch: its tensors' identities may be given to others."""
        self.sources.clear()

    def _tensor(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.sources:
            moved = tensor.to(self.device)
            same = (held for held in self.held if held.dtype == moved.dtype and torch.equal(held, moved))
            found = next(same, None)
            if found is None:
                self.held.append(found := moved)
            self.sources[id(tensor)] = (tensor, found)
        return self.sources[id(tensor)][1]


class _Enough(Exception):
    """Ends a block's pass whose rest is not needed."""


class _Watch:
    """Hooks that sum up what the linear layers of a block see; layers fed with one tensor are measured once."""

    def __init__(self, linears: Mapping[str, nn.Linear], measure: Callable[[Tensor], Tensor], *, stop: bool) -> None:
        self.linears, self.measure, self.stop = linears, measure, stop
        self.totals: dict[str, Tensor] = {}
        self.first: dict[str, str] = {}  # layer -> the layer that is measured for it
        self.seen: dict[str, Tensor] = {}  # in this pass

    def __enter__(self) -> None:
        self.handles = [linear.register_forward_pre_hook(self._hook(name)) for name, linear in self.linears.items()]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.seen = {}

    def sums(self) -> dict[str, Tensor]:
        """The sum of each layer, the very same tensor for layers that share one."""
        missing = [name for name in self.linears if name not in self.first]
        if missing:
            raise PruneError(f"{missing[0]}: never run in a forward pass, so it has no activations to score by")
        return {name: self.totals[first] for name, first in self.first.items()}

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: self._see(name, inputs[0])

    def _see(self, name: str, x: Tensor) -> None:
        if name in self.seen:  # a new pass
            self.seen = {}
        self.first.setdefault(name, next((other for other, seen in self.seen.items() if seen is x), name))
        self.seen[name] = x
        if self.first[name] == name:
            measured = self.measure(x.detach().reshape(-1, x.shape[-1]))
            self.totals[name] = self.totals[name].add_(measured) if name in self.totals else measured
        else:
            if self.seen[self.first[name]] is not x:
                raise AssertionError(f"{name}: shares its input in one pass and not in another")
        if len(self.seen) == len(self.linears):
            self.seen = {}
            if self.stop:
                raise _Enough


def squares(x_NI: Tensor) -> Tensor:
    """Sum over tokens of x_i^2 (I), in fp32 within a batch and fp64 over batches."""
    return torch.linalg.vector_norm(x_NI, dim=0, dtype=torch.float32).double().square()


def gram(x_NI: Tensor) -> Tensor:
    """x^T x (I, I) with fp32 sums; half precision inputs are multiplied exactly where the device can."""
    if x_NI.device.type == "cuda" and x_NI.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x_NI.T, x_NI, out_dtype=torch.float32)
    x_NI = x_NI.float()
    return x_NI.T @ x_NI


def norms(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """||x_i|| (I, fp32) from the sums of `squares`; raises PruneError where they are not finite."""
    check_finite(sums)
    return {name: square_I.sqrt().float() for name, square_I in sums.items()}


def check_finite(sums: Mapping[str, Tensor]) -> None:
    """Raise PruneError naming the first layer whose sum is not finite; the device is waited for once."""
    finite = torch.stack([total.sum().isfinite() for total in sums.values()]).tolist()
    for name, fine in zip(sums, finite, strict=True):
        if not fine:
            raise PruneError(f"{name}: sees inputs that are not finite. Check the weights, or use model.dtype: float32")
