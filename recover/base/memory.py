"""How much memory of a GPU a recovery takes, from the model's shape: arithmetic alone, no torch.

One copy of the weights serves as teacher and student (`models/twin.py`). The bytes of activations are those that
autograd keeps in recover's own step, counted tensor by tensor; `tests/test_memory.py` holds them against a real step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import NamedTuple

GIB = 2**30

# Per logit of a chunk: two sides in fp32, the gradient, and what the fused terms need (measured: 12.4, H200).
LOGIT_BYTES = 13
ROUTED_BYTES = 36  # of a token and expert that it goes through: router weights, and places as 64-bit numbers
RUNTIME_BYTES = 3 * GIB // 2  # CUDA context, NCCL, cuBLAS: not the model's, and on every GPU
PROCESSORS = 132  # multiprocessors of an H100 or H200; what has fewer holds about as many rows of logits
USABLE = 0.95  # of a GPU's memory: the allocator leaves gaps
MAIN_USABLE = 0.7  # of a machine's main memory: others live there too

# launch/*.json: DeepSpeed sets aside a bucket of so many float32 gradients, two of them in ZeRO-2.
BUCKET = 20_000_000
LIVE_PARAMETERS = 1_000_000_000  # that ZeRO-3 holds whole at a time (stage3_max_live_parameters)


@dataclass(frozen=True)
class Mixture:
    """Mixtures of experts in the place of MLPs, in all blocks but `plain` of them.

    experts: in each block; used: of them, by a token. intermediate: neurons of an expert; shared: neurons that every
    token goes through beside them. expert: parameters of one; row: of the router for it; always: of router and shared
    experts in a block. groups: that a router chooses from; used_groups: from so many of them for a token.
    """

    experts: int
    used: int
    intermediate: int
    expert: int
    always: int
    shared: int = 0
    plain: int = 0
    row: int = 0
    groups: int = 1
    used_groups: int = 1

    def mean(self, mixed: float, plain: float, blocks: int) -> float:
        """Of a figure that blocks with a mixture have, and plain ones, the mean over all blocks."""
        return (mixed * (blocks - self.plain) + plain * self.plain) / blocks


@dataclass(frozen=True)
class Shape:
    """What of a model decides its memory; `parameters` counts tied ones once."""

    parameters: int
    blocks: int
    width: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    mlp_matrices: int = field(default=3, kw_only=True)  # gate, up and down; without a gate 2
    attending: int | None = field(default=None, kw_only=True)  # blocks with keys and values, where not all have them
    mixture: Mixture | None = field(default=None, kw_only=True)
    lone_mlps: int | None = field(default=None, kw_only=True)  # where a block is one sublayer: those that are an MLP

    @property
    def shares(self) -> tuple[float, float]:
        """Of all blocks, those with attention (or a mixer), and those with an MLP."""
        mlps = None if self.lone_mlps is None else self.lone_mlps / self.blocks
        return (1.0, 1.0) if mlps is None else (1 - mlps, mlps)

    @property
    def active(self) -> int:
        """Parameters that a token goes through: of a mixture, as many experts as the router gives it."""
        one = self.mixture
        return self.parameters - (
            0 if one is None else (self.blocks - one.plain) * (one.experts - one.used) * one.expert
        )

    @property
    def mlp_active(self) -> float:
        """Of an MLP's parameters those that a token goes through; the mean over blocks where they differ."""
        plain, one = self.shares[1] * self.mlp_matrices * self.width * self.intermediate, self.mixture
        return plain if one is None else one.mean(one.used * one.expert + one.always, plain, self.blocks)


# Sizes of models as published: parameters, blocks, width, intermediate, heads, KV heads, head size, vocabulary.
PUBLISHED = {
    "0.1B (SmolLM2-135M)": Shape(134_515_008, 30, 576, 1536, 9, 3, 64, 49_152),
    "1B (Llama-3.2-1B)": Shape(1_235_814_400, 16, 2048, 8192, 32, 8, 64, 128_256),
    "3B (Llama-3.2-3B)": Shape(3_212_749_824, 28, 3072, 8192, 24, 8, 128, 128_256),
    "7B (Qwen2.5-7B)": Shape(7_615_616_512, 28, 3584, 18944, 28, 4, 128, 152_064),
    "13B (Llama-2-13B)": Shape(13_015_864_320, 40, 5120, 13824, 40, 40, 128, 32_000),
    "32B (Qwen2.5-32B)": Shape(32_763_876_352, 64, 5120, 27648, 40, 8, 128, 152_064),
    "70B (Llama-3.1-70B)": Shape(70_553_706_496, 80, 8192, 28672, 64, 8, 128, 128_256),
}


@dataclass(frozen=True)
class Training:
    """What of a recipe and a launch decides its memory. `tokens` and `cached` are those of one process.

    tokens: sequences at once x their length. cached: tokens in the KV cache while generation is measured.
    parts: what learns of a mixture, as `lora.parts`.
    own: weights that the pruned view has beside the dense ones. averaged: adapters are (`train.average`).
    lean: norms and MLPs keep no more than they must (`models/lean.py`; never under masks or ZeRO-3).
    sharded: processes of a machine that share out the blocks' weights (`train.shard_weights`); 1: whole on each.
    place: where the blocks' matrices lie while their block does not compute (`model.offload`: cpu or disk); bits: in
    how few bits they are held (`model.load_in`), 0 where they are as they are.
    element: bytes of a weight. zero: DeepSpeed's stage, 0 without it. offload: the shares lie in host memory.
    """

    tokens: int
    rank: int = 16
    parts: tuple[str, ...] = ("linears",)
    averaged: bool = False
    chunk: int = 2048
    checkpointing: bool = False
    element: int = 2
    kept_blocks: int | None = None
    masked: bool = False
    own: int = 0
    cached: int = 16_384
    processes: int = 1
    sharded: int = 1
    zero: int = 0
    offload: bool = False
    lean: bool = True
    place: str = "gpu"
    bits: int = 0

    @property
    def comes_and_goes(self) -> bool:
        """Whether the blocks' matrices are with the model while their block computes only, in every stage."""
        return self.place != "gpu" or self.bits > 0 or (self.sharded > 1 and self.zero == 0)


def rows_for(chunk: int, width: int, processors: int) -> int:
    """At most `chunk` rows of logits, as many as leave the fewest multiprocessors idle in the loss's last product.

    That one has few tiles of output, (rows, width), and long sums, over the vocabulary: at width 3584, 1152 rows take
    126 of an H200's 132 multiprocessors once, and 2048 rows take 224 of them in two rounds. Tiles of 128 x 256, as in
    its fastest products.
    """
    columns = -(-width // 256)

    def busy(tiles: int) -> float:
        rounds = -(-tiles * columns // processors)
        return tiles * columns / (rounds * processors)

    return 128 * max(range(1, chunk // 128 + 1), key=busy) if chunk >= 128 else chunk


def adapter_parameters(shape: Shape, rank: int, blocks: int, parts: Collection[str] = ("linears",)) -> int:
    """Of LoRA on all linears of so many blocks: rank x (in + out) of each; beside a mixture, on attention's alone.

    `parts`, as `lora.parts`: of a mixture also (or only) every expert's two matrices, routers as they are, and the
    three of shared experts and plain MLPs.
    """
    query, kv = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    attention = 2 * (shape.width + query) + 2 * (shape.width + kv)
    one, (attending, mlps) = shape.mixture, shape.shares
    if one is None:
        mlp = shape.mlp_matrices * (shape.width + shape.intermediate)
        return round(blocks * rank * (attending * attention + mlps * mlp))
    expert = 2 * shape.width + 3 * one.intermediate  # gate and up in one matrix, and down
    mixed = (rank * expert if "experts" in parts else 0) + (one.row if "router" in parts else 0)
    attended = blocks * rank * attention if "linears" in parts else 0
    beside = [3 * rank * (shape.width + neurons) * ("shared" in parts) for neurons in (one.shared, shape.intermediate)]
    if not one.shared:
        beside[0] = 0
    return attended + round(one.mean(one.experts * mixed + beside[0], beside[1], shape.blocks) * blocks)


def matrix_parameters(shape: Shape) -> int:
    """Of a block's linears; the mean where a block is one sublayer."""
    query, kv = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    if shape.lone_mlps is not None:
        return round(shape.shares[0] * shape.width * (2 * query + 2 * kv) + shape.mlp_active)
    one, plain = shape.mixture, shape.mlp_matrices * shape.width * shape.intermediate
    mlp = plain if one is None else one.mean(one.experts * one.expert + one.always, plain, shape.blocks)
    return shape.width * (2 * query + 2 * kv) + round(mlp)


def block_bytes_per_token(shape: Shape, rank: int, element: int, *, lean: bool = True) -> int:
    """Bytes that autograd keeps for a block and token, without checkpointing.

    D width, Q and K the widths of all query and KV heads, F intermediate, R rank, A heads, E bytes of a number. Both
    norms' inputs and outputs, which the adapters behind them share, 4 D E; q, k, v and the attention's output 2 Q E +
    2 K E; gate and up 2 F E; adapters 7 R E; softmax sums 4 A. If not lean, norms keep fp32 inputs and one number a
    row, and the MLP its activation and product, 2 F E more. The mean where a block is one sublayer. Of a mixture see
    `_mixture_bytes_per_token`.
    """
    query, kv = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    if shape.mixture:
        return _mixture_bytes_per_token(shape, shape.mixture, rank, element, lean=lean)
    attending, mlps = shape.shares  # each has a norm of the two
    kept = element * (2 * shape.width + 2 * query + 2 * kv + 4 * rank) + 4 * shape.heads
    mlp = element * (2 * shape.width + 2 * shape.intermediate + 3 * rank)
    if not lean:
        kept += (4 - element) * shape.width + 4
        mlp += (4 - element) * shape.width + 4 + 2 * element * shape.intermediate
    return round(attending * kept + mlps * mlp)


def _mixture_bytes_per_token(shape: Shape, one: Mixture, rank: int, element: int, *, lean: bool) -> int:
    """As `block_bytes_per_token`, the mean over blocks with a mixture and plain ones, adapters on attention alone.

    Of each expert that a token goes through gate, activation and up, 3 F E, and its output, D E, with router weights
    and places in several orders; of shared experts 3 S E; the router's probabilities in float32.
    """
    query, kv = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    around = element * (3 * shape.width + 2 * query + 2 * kv + 4 * rank) + 4 * shape.heads
    if not lean:
        around += 2 * (4 - element) * shape.width + 8
    routed = one.used * (element * (3 * one.intermediate + shape.width + 1) + ROUTED_BYTES) + 4 * one.experts
    mixed, plain = routed + element * 3 * one.shared, element * 3 * shape.intermediate
    return round(around + one.mean(mixed, plain, shape.blocks))


def kv_bytes_per_token(shape: Shape, element: int) -> int:
    """Of the KV cache, all blocks that attend."""
    return 2 * (shape.attending or shape.blocks) * shape.kv_heads * shape.head_size * element


def training_parts(shape: Shape, training: Training) -> dict[str, int]:
    """Bytes on one GPU at the height of a training step, by what they are for.

    Adapters are float32 with gradient and two Adam moments, 16 bytes a parameter, and a half-precision copy to multiply
    by; DeepSpeed adds a float32 master copy, and shares out all of it (ZeRO-3), or gradients, moments and master copy.
    """
    share = 1 / training.processes if training.zero == 3 else 1.0
    kept = shape.blocks if training.kept_blocks is None else training.kept_blocks
    lean = training.lean and not training.masked and training.zero != 3
    block = block_bytes_per_token(shape, training.rank, training.element, lean=lean)
    stored = shape.width * training.element if training.checkpointing else block
    rows = rows_for(training.chunk, shape.width, PROCESSORS)
    live = min(shape.parameters, LIVE_PARAMETERS) * training.element if training.zero == 3 else 0
    away = _away(shape, training)
    weights = round(0 if training.offload else shape.parameters * training.element * share) - shape.blocks * away
    return {
        "weights": weights + _packed(shape, training)[0],
        "masks": shape.parameters // 8 if training.masked else 0,
        "own": training.own * training.element,  # buffers: ZeRO-3 does not share them out
        "adapters": round(adapter_parameters(shape, training.rank, kept, training.parts) * _adapter_bytes(training)),
        # One more block: what is computed again, or the gradients of the block that backward is in.
        "activations": training.tokens * (kept * stored + block),
        "loss": min(training.tokens, rows) * shape.vocabulary * LOGIT_BYTES,
        "engine": live + 2 * away + {0: 0, 2: 8, 3: 4}[training.zero] * BUCKET,
        "runtime": RUNTIME_BYTES,
    }


def _away(shape: Shape, training: Training) -> int:
    """Bytes of a block that come and go; they are there for two blocks at a time."""
    share = 1.0 if training.place != "gpu" or training.bits else 1 - 1 / training.sharded
    return round(matrix_parameters(shape) * training.element * share)


# Of a number in so few bits, with the scales that it shares: 64 of them one in 8 bits, 256 of those one in 32, of NF4.
PACKED = {4: (1 / 2, (1 + 4 / 256) / 64), 8: (1.0, 0.0)}


def _packed(shape: Shape, training: Training) -> tuple[int, int]:
    """Bytes of matrices held in few bits: on the GPU, and in main memory."""
    if not training.bits:
        return 0, 0
    numbers, scales = PACKED[training.bits]
    scales = scales or 4 / shape.width  # of int8, one a row
    matrices = shape.blocks * matrix_parameters(shape)
    if training.place == "gpu":
        return round(matrices * (numbers + scales)), 0
    return round(matrices * scales), round(matrices * numbers)


def host_bytes(shape: Shape, training: Training) -> int:
    """Bytes of main memory that hold weights, once for all processes of a machine (in few bits: for each).

    Files that stay on the disk are kept in memory by the system as far as there is room, and are not counted.
    """
    if training.bits:
        return _packed(shape, training)[1]
    return shape.blocks * matrix_parameters(shape) * training.element if training.place == "cpu" else 0


def _adapter_bytes(training: Training) -> float:
    copy = 2 if training.element == 2 else 0
    buckets = 4 if training.processes > 1 and training.zero == 0 else 0  # DDP's own
    means = 8 if training.averaged else 0  # beside them the adapters as they are, at an epoch's end
    return {
        0: 16 + copy + buckets + means,
        2: 8 + copy + 16 / training.processes + means,
        3: copy + (0 if training.offload else 20 / training.processes),
    }[training.zero]


def measuring_bytes(shape: Shape, training: Training) -> int:
    """Bytes on one GPU while a model is measured.

    Each process holds it whole, unless weights come and go in every stage: DeepSpeed's shares are for training alone.
    """
    weights = shape.parameters * training.element + _packed(shape, training)[0]
    if training.comes_and_goes:
        weights -= (shape.blocks - 2) * _away(shape, training)
    shared = training_parts(shape, training)["weights"] if training.zero == 3 else 0  # the engine's, in between epochs
    own = training.own * training.element
    return weights + own + shared + training.cached * kv_bytes_per_token(shape, training.element) + RUNTIME_BYTES


def sharing_out_bytes(shape: Shape, training: Training) -> int:
    """Bytes on one GPU while blocks are shared out for a training, or whole again: a share beside whole weights."""
    if training.comes_and_goes or training.sharded == 1:
        return 0
    own = shape.blocks * matrix_parameters(shape) // training.sharded
    return (shape.parameters + own + training.own) * training.element + RUNTIME_BYTES


def peak_bytes(shape: Shape, training: Training) -> int:
    """The largest of training, measuring and what lies between them, on one GPU."""
    training_bytes = sum(training_parts(shape, training).values())
    return max(training_bytes, measuring_bytes(shape, training), sharing_out_bytes(shape, training))


# What makes room on one machine, from the least trouble to the most: in words, fields of a recipe, what they are here.
LESS: dict[str, object] = {"train.gradient_checkpointing": True}
SHARED: dict[str, object] = {"train.shard_weights": True}
Choice = tuple[str, dict[str, object], dict[str, object]]


def _with_checkpointing(name: str, fields: dict[str, object], changes: dict[str, object]) -> tuple[Choice, Choice]:
    return (name, fields, changes), (f"{name} + checkpointing", fields | LESS, changes | {"checkpointing": True})


CHOICES: tuple[Choice, ...] = (
    ("gpu", {}, {}),
    ("shard_weights", SHARED, {}),
    ("checkpointing", LESS, {"checkpointing": True}),
    ("shard_weights + checkpointing", SHARED | LESS, {"checkpointing": True}),
    *_with_checkpointing("offload", {"model.offload": "cpu"}, {"place": "cpu"}),
    *_with_checkpointing("8bit", {"model.load_in": "8bit"}, {"bits": 8}),
    *_with_checkpointing("4bit", {"model.load_in": "4bit"}, {"bits": 4}),
    *_with_checkpointing(
        "4bit + offload", {"model.load_in": "4bit", "model.offload": "cpu"}, {"bits": 4, "place": "cpu"}
    ),
    *_with_checkpointing("disk", {"model.offload": "disk"}, {"place": "disk"}),
)
HALF: dict[str, object] = {"model.dtype": "bfloat16"}


@dataclass(frozen=True)
class Room:
    """Bytes that a machine has to give: of each `gpu` (None: it computes in main memory), and of main memory, `host`.

    `processes`: of one machine, which share its main memory. `files`: the model's can be read a tensor at a time.
    """

    gpu: int | None
    host: int
    processes: int = 1
    files: bool = True

    def takes(self, shape: Shape, training: Training) -> tuple[int, int]:
        """(of a GPU, of main memory) at the height of a run."""
        peak, held = peak_bytes(shape, training), host_bytes(shape, training)
        if self.gpu is None:
            return 0, self.processes * peak
        return peak, held * (self.processes if training.bits else 1)

    def holds(self, shape: Shape, training: Training) -> bool:
        """Whether a run fits."""
        gpu, host = self.takes(shape, training)
        return gpu <= (self.gpu or 0) and host <= self.host


class Fitting(NamedTuple):
    """A choice in words, the fields that make it, and what it is in figures."""

    name: str
    fields: dict[str, object]
    training: Training


Tries = Sequence[tuple[dict[str, object], Training]]


def fittings(tries: Tries, room: Room) -> Iterator[Fitting]:
    """All ways to make room, from the least trouble to the most.

    `tries`: a training as it is, and then with ever less at once, each with the fields that say so. What leaves every
    figure as it is comes before half precision, and each place of the weights before the next one.
    """
    for _, group in groupby(CHOICES, key=lambda choice: (choice[2].get("place"), choice[2].get("bits"))):
        level = [choice for choice in group if _possible(choice, room)]
        for half in (False, True):
            for name, fields, changes in level:
                sharded = room.processes if "train.shard_weights" in fields else 1
                plain: dict[str, object] = {"sharded": sharded, "checkpointing": False, "place": "gpu", "bits": 0}
                if {*fields} - {*LESS}:  # DeepSpeed deals weights out itself, and takes none of these
                    plain |= {"zero": 0, "offload": False}
                for less, training in tries:
                    if half and training.element != 4:
                        continue
                    smaller = {"element": 2} if half else {}
                    tried = replace(training, **(plain | changes | smaller))  # type: ignore[arg-type]
                    yield Fitting(name, (HALF if half else {}) | less | fields, tried)


def _possible(choice: Choice, room: Room) -> bool:
    _, fields, changes = choice
    place = changes.get("place")
    return (
        (room.processes > 1 or "train.shard_weights" not in fields)
        and (room.gpu is not None or place != "cpu")
        and (room.files or place != "disk")
    )


def fitting(shape: Shape, tries: Tries, room: Room) -> Fitting | None:
    """The first of `fittings` that fits; None: nothing does."""
    return next((found for found in fittings(tries, room) if room.holds(shape, found.training)), None)


def launch_for(shape: Shape, gpu_bytes: int, tokens: int, processes: int = 8) -> str:
    """What makes room on GPUs of this memory on one machine, of `CHOICES`; "none" if nothing fits."""
    room = Room(int(USABLE * gpu_bytes), 2**62, processes)  # main memory as large as need be
    found = fitting(shape, [({}, Training(tokens, processes=processes))], room)
    return "none" if found is None else found.name
