"""What 2:4 sparsity gains in torch's own kernels: a linear, an MLP and a block's linears of Qwen2.5-7B, in bfloat16.

    python benchmarks/sparse24.py        # one CUDA GPU, less than a minute; prints a markdown table

All variants are timed by turns in one run. A cell is dense time / sparse time (above 1 is faster), the median of paired
repeats with p10 and p90; `graph` replays a CUDA graph, which leaves out the time Python needs to launch a kernel.
`error` is the largest relative error of the output against fp32, over what the dense kernel makes itself.

Legend: N tokens, I in features, O out features.
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from recover.measure.speed import paired_ratio

D, FF, KV = 3584, 18944, 512
SHAPES_OI = {"q": (D, D), "k": (KV, D), "v": (KV, D), "o": (D, D), "gate": (FF, D), "up": (FF, D), "down": (D, FF)}
DECODE, PREFILL = (1, 16), (2048, 8192)
REPEATS, SLICE_SECONDS = 11, 0.004  # one timing is as many calls as fill the slice
WRONG = 3.0  # times the dense kernel's own error

Weights = dict[str, Any]
Failures = dict[str, str]


def gate(w: Weights, x_ND: Tensor) -> Tensor:
    return F.linear(x_ND, w["gate"])


def mlp(w: Weights, x_ND: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x_ND, w["gate"])) * F.linear(x_ND, w["up"]), w["down"])


def block(w: Weights, x_ND: Tensor) -> Tensor:
    """All seven linears of a block, attention and norms left out."""
    q_ND, k_NK, v_NK = (F.linear(x_ND, w[name]) for name in "qkv")
    h_ND = F.linear(q_ND, w["o"])
    return torch.cat([mlp(w, x_ND + h_ND), k_NK, v_NK], dim=1)


UNITS: dict[str, tuple[Callable[[Weights, Tensor], Tensor], tuple[str, ...]]] = {
    f"linear {D} to {FF}": (gate, ("gate",)),
    "MLP": (mlp, ("gate", "up", "down")),
    "block's linears": (block, tuple(SHAPES_OI)),
}


def keep_2_of_4(weight_OI: Tensor) -> Tensor:
    """The weight with the two smallest of each four neighbours of a row set to zero."""
    groups = weight_OI.view(weight_OI.shape[0], -1, 4)
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, groups.abs().topk(2, dim=2).indices, True)
    return (groups * keep).view_as(weight_OI)


def cusparselt(weight_OI: Tensor) -> Tensor:
    return torch.sparse.SparseSemiStructuredTensorCUSPARSELT.from_dense(weight_OI)


def cutlass(weight_OI: Tensor) -> Tensor:
    return torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense(weight_OI)


def searched(weight_OI: Tensor, tokens: int) -> Tensor:
    """cuSPARSELt with the algorithm that it finds fastest for this many tokens."""
    sparse: Any = cusparselt(weight_OI)
    x_NI = torch.randn(max(8, tokens), weight_OI.shape[1], device="cuda", dtype=torch.bfloat16)
    found: Any = torch.ops.aten._cslt_sparse_mm_search(sparse.packed, x_NI.t(), transpose_result=True)
    sparse.alg_id_cusparselt = int(found)
    return sparse


@dataclass
class Bench:
    """The weights in each form, and why a form is not there."""

    dense: Weights
    masked: Weights
    forms: dict[str, Weights] = field(default_factory=dict)
    failures: Failures = field(default_factory=dict)

    def add(self, name: str, convert: Callable[[Tensor], Tensor]) -> None:
        """Keep the weights converted, or the reason why they cannot be."""
        self.forms.pop(name, None)
        try:
            self.forms[name] = {key: convert(weight_OI) for key, weight_OI in self.masked.items()}
            torch.cuda.synchronize()
        except Exception as error:  # a kernel that refuses is a result: it is printed in the table
            self.forms.pop(name, None)
            self.failures[name] = _first_line(error)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:110]}".replace("|", "/")


def graphed(call: Callable[[], Tensor]) -> Callable[[], Any]:
    """A replay of the call's kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def seconds(call: Callable[[], Any], calls: int) -> float:
    """Device seconds of one call, over so many in a row."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / calls


def by_turns(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of each, in rounds; every second round goes backwards, so that a drift favours none."""
    counts = {}
    for name, call in calls.items():
        seconds(call, 3)
        counts[name] = max(1, min(200, math.ceil(SLICE_SECONDS / seconds(call, 3))))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(REPEATS):
        for name in list(calls)[:: -1 if repeat % 2 else 1]:
            found[name].append(seconds(calls[name], counts[name]))
    return found


def relative_error(y: Tensor, truth: Tensor) -> float:
    return ((y.float() - truth).norm() / truth.norm()).item()


def row(bench: Bench, unit: str, tokens: int, *, graph: bool) -> list[str]:
    """One line of the table: each variant against the dense kernel on unpruned weights."""
    function, names = UNITS[unit]
    x_ND = torch.randn(tokens, D, device="cuda", dtype=torch.bfloat16)
    truth = function({name: bench.masked[name].float() for name in names}, x_ND.float())
    own_error = relative_error(function(bench.masked, x_ND), truth)
    calls: dict[str, Callable[[], Any]] = {}
    cells, errors = dict(bench.failures), []
    for name, weights in {"dense": bench.dense, "masked, dense kernel": bench.masked, **bench.forms}.items():

        def call(weights: Weights = weights) -> Tensor:
            return function(weights, x_ND)

        try:
            if name != "dense":
                errors.append(relative_error(call(), truth) / own_error)
            calls[name] = graphed(call) if graph else call
            seconds(calls[name], 1)
        except Exception as error:  # printed in the table
            calls.pop(name, None)
            cells[name] = _first_line(error)
    times = by_turns(calls)
    for name in times.keys() - {"dense"}:
        found = paired_ratio(list(zip(times[name], times["dense"], strict=True)))
        low, high = found["interval"]
        cells[name] = f"{found['value']:.2f} [{low:.2f}, {high:.2f}]"
    dense = sorted(times["dense"])[REPEATS // 2] * 1e6
    wrong = "" if all(error < WRONG for error in errors) else " WRONG"
    shown = [cells.get(name, "not run") for name in VARIANTS]
    return [unit, f"{tokens}", "graph" if graph else "eager", *shown, f"{dense:,.0f}", f"{max(errors):.2f}{wrong}"]


VARIANTS = ("cuSPARSELt", "cuSPARSELt, searched", "CUTLASS", "masked, dense kernel")
COLUMNS = ("what", "tokens", "launch", *VARIANTS, "dense, µs", "error")


def main() -> None:
    if not torch.cuda.is_available():
        print("needs CUDA")
        return
    warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor.*")
    torch.manual_seed(0)
    started = time.perf_counter()
    dense = {
        name: torch.randn(shape, device="cuda", dtype=torch.bfloat16) / shape[1] ** 0.5
        for name, shape in SHAPES_OI.items()
    }
    bench = Bench(dense, {name: keep_2_of_4(weight) for name, weight in dense.items()})
    bench.add("cuSPARSELt", cusparselt)
    bench.add("CUTLASS", cutlass)
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    print(f"{machine}. Dense time / time, {REPEATS} repeats by turns; above 1 is faster.\n")
    print(f"| {' | '.join(COLUMNS)} |\n|---|{'---:|' * (len(COLUMNS) - 1)}", flush=True)
    for tokens in (*DECODE, *PREFILL):
        bench.add("cuSPARSELt, searched", functools.partial(searched, tokens=tokens))
        for unit in UNITS:
            for graph in (True, False) if tokens in DECODE else (False,):
                print(f"| {' | '.join(row(bench, unit, tokens, graph=graph))} |", flush=True)
    print(f"\n{time.perf_counter() - started:.0f} s in all.")


if __name__ == "__main__":
    with torch.no_grad():
        main()
