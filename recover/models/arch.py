"""Where the parts of each supported architecture are: one row of `ARCHS` a model type.

Nothing else in `recover` names a module, nor the keyword under which one takes a KV cache.

Shapes: V vocabulary, D width.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

from torch import Tensor, nn
from transformers import Cache, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from recover.base import zero
from recover.base.errors import ModelError
from recover.maths.divergence import Head
from recover.models.refusal import PER_BLOCK, unsupported
from recover.models.site import SUBLAYERS, Site, Sublayer

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
UP_DOWN = ("up_proj", "down_proj")
GATE_UP = ("gate_up_proj", "down_proj")

Lean = Literal["norm", "mlp", "rotary"]
# Where norms are that do not stand before a sublayer alone.
BEHIND: dict[str, Any] = {
    "attention_norms": ("post_attention_layernorm",),
    "mlp_norms": ("post_feedforward_layernorm",),
    "norm_behind": True,
}
AROUND: dict[str, Any] = {
    "attention_norms": ("input_layernorm", "post_attention_layernorm"),
    "mlp_norms": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "norm_behind": True,
}


def _no_scale(config: PretrainedConfig) -> float:
    return 1.0


def _no_softcap(config: PretrainedConfig) -> float | None:
    return None


def _all_alike(config: Mapping[str, Any]) -> str:
    return ""


def _with_experts(config: Mapping[str, Any]) -> str:
    return "it is a mixture of experts; its dense models are supported" if config.get("num_local_experts") else ""


def _with_experts_in_blocks(config: Mapping[str, Any]) -> str:
    """Nemotron 3."""
    kinds = config.get("layers_block_type") or config.get("layer_types") or config.get("hybrid_override_pattern") or ()
    if "moe" not in kinds and "E" not in kinds:
        return ""
    return (
        "some of its blocks are mixtures of experts without a gate, and what scores, masks and trains experts takes "
        "gate and up as one matrix; Nemotron-H and Nemotron Nano 2 have none"
    )


def _with_parts_of_blocks(config: Mapping[str, Any]) -> str:
    """Gemma 4's E2B, E4B and 26B-A4B."""
    if config.get("num_kv_shared_layers") or config.get("hidden_size_per_layer_input"):
        return f"it has {PER_BLOCK.called.partition('a model with ')[2]}; {PER_BLOCK.why}. Instead: {PER_BLOCK.instead}"
    if config.get("use_double_wide_mlp"):
        return "some of its blocks have MLPs of twice the width"
    return "it has a mixture of experts beside each MLP" if config.get("enable_moe_block") else ""


def _by_number(config: Mapping[str, Any]) -> str:
    """GPT-2's, trained in ways of which the published ones make no use."""
    if config.get("scale_attn_by_inverse_layer_idx"):
        return "each block divides its attention by its number, which is another one once blocks have gone"
    return _crossing(config)


def _crossing(config: Mapping[str, Any]) -> str:
    return "its blocks attend to an encoder too (add_cross_attention)" if config.get("add_cross_attention") else ""


def _one_behind_the_other(config: PretrainedConfig) -> bool:
    return False


def _side_by_side(config: PretrainedConfig) -> bool:
    return getattr(config, "use_parallel_residual", True)


def _final_softcap(config: PretrainedConfig) -> float | None:
    return config.final_logit_softcapping


@dataclasses.dataclass(frozen=True)
class ExpertNames:
    """Names inside an MLP that is a mixture of experts; a block without a module `experts` there has a plain MLP.

    The router has a row an expert in its weight and in all else that it holds, and gives (logits, weights, experts) of
    each token. The experts are 3-D parameters of one module: `gate_up_proj` and `down_proj`, with a matrix each.
    """

    router: str = "gate"
    experts: str = "experts"
    shared: str = ""  # an MLP beside them that every token goes through, with the linears of a plain one
    width: str = "intermediate_size"  # of the config: neurons of an expert
    count: str = "num_local_experts"  # of the config: experts of a mixture
    gives_scores: bool = False  # the MLP gives (hidden states, router scores)
    grouped: bool = False  # experts are chosen from groups of equal size, `n_group` of them


@dataclasses.dataclass(frozen=True)
class Arch:
    """Names inside one architecture, from the causal LM down.

    logits = softcap(scale * (norm(h) W^T + bias)). The last linear of a sublayer writes to the residual stream. Each
    norm of a block belongs to one sublayer, before or behind it, and goes where the sublayer goes.
    """

    model_type: str
    blocks: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    norm: str = "model.norm"
    head: str = "lm_head"
    embed: str = "model.embed_tokens"
    attention_linears: tuple[str, ...] = ATTENTION
    mlp_linears: tuple[str, ...] = MLP
    logit_scale: Callable[[PretrainedConfig], float] = _no_scale
    softcap: Callable[[PretrainedConfig], float | None] = _no_softcap
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)
    gated: bool = True  # down(activation(gate) * up), else down(activation(up))
    parallel: Callable[[PretrainedConfig], bool] = _one_behind_the_other  # attention and MLP read one input
    norm_behind: bool = False  # a norm between the sublayer and the stream: nothing can be folded through it
    packs: bool = True  # its blocks hand on to attention where sequences of a packed row begin
    mixer: str = ""  # what some or all blocks have in the place of attention, or beside it: it keeps a state
    mixer_linears: tuple[str, ...] = ()
    unadapted: tuple[str, ...] = ()  # linears of the mixer that peft puts no LoRA on
    neurons: str = "intermediate_size"  # the field of the config that says how wide an MLP is
    unlike: Callable[[Mapping[str, Any]], str] = _all_alike  # why this model of the type is not supported, if it is not
    whole: bool = False  # halves of two blocks make no block: something of each block acts on the stream behind it
    lone: bool = False  # a block is one sublayer: attention, a mixer or an MLP, in a module that has one name in all
    last_stays: bool = False  # the class takes the last block for one that attends to all
    kv_groups_stay: str = ""  # why width pruning cannot remove KV groups, empty where it can
    experts: ExpertNames | None = None  # how an MLP is a mixture of experts, where one is
    lean: tuple[Lean, ...] = ("norm", "mlp", "rotary")  # what computes as Llama's does, and can do with less memory

    def together(self, config: PretrainedConfig) -> bool:
        """Whether only the sublayers of one block can be stored as a block."""
        return self.whole or self.lone or self.parallel(config)

    @property
    def mlp_matrices(self) -> int:
        """Matrices of (width, neurons) in an MLP, fused ones counted apart."""
        return 3 if self.gated else 2

    @property
    def last_linears(self) -> tuple[str, ...]:
        """What writes to the residual stream, by its name inside a block; not every block has all of them."""
        parts = (self.attention, self.attention_linears), (self.mixer, self.mixer_linears), (self.mlp, self.mlp_linears)
        return tuple(f"{name}.{linears[-1]}" for name, linears in parts if name)


MIXED = "some of its blocks have a mixer in the place of attention, or beside it, without keys and values"
SINKS = "its attention has a sink for each head, which is no part of a linear layer"
ALL_HEADS = "its q_norm and k_norm take all heads together, so that removing one changes the others"


ARCHS: dict[str, Arch] = {
    arch.model_type: arch
    for arch in (
        Arch("llama"),
        Arch("mistral"),
        Arch("qwen2"),
        Arch("qwen3"),
        Arch("gemma2", softcap=_final_softcap, **AROUND, lean=("mlp", "rotary")),
        Arch("gemma3_text", softcap=_final_softcap, **AROUND, lean=("mlp", "rotary")),
        Arch(
            "phi3",
            attention_linears=("qkv_proj", "o_proj"),
            mlp_linears=GATE_UP,
            kv_groups_stay="q, k and v are one linear, cut by head counts of the config, which both views share",
            lean=("norm",),
        ),
        Arch("smollm3"),
        Arch("olmo2", **BEHIND, kv_groups_stay=ALL_HEADS, lean=("mlp",)),
        Arch("olmo3", **BEHIND, kv_groups_stay=ALL_HEADS, lean=("mlp",)),
        Arch("granite", logit_scale=lambda config: 1.0 / config.logits_scaling),
        Arch(
            "granite_swa",
            logit_scale=lambda config: 1.0 / config.logits_scaling,
            kv_groups_stay=SINKS,
        ),
        Arch("gemma", lean=("mlp", "rotary")),
        Arch("ministral3"),
        Arch("exaone4", **BEHIND),
        Arch("seed_oss", lean=("norm", "rotary")),
        Arch("ernie4_5", lean=("norm", "mlp")),
        Arch("hunyuan_v1_dense"),
        Arch("glm", mlp_linears=GATE_UP, lean=("norm",)),
        Arch(
            "glm4",
            mlp_linears=GATE_UP,
            attention_norms=("input_layernorm", "post_self_attn_layernorm"),
            mlp_norms=("post_attention_layernorm", "post_mlp_layernorm"),
            norm_behind=True,
            lean=("norm",),
        ),
        Arch("arcee", mlp_linears=UP_DOWN, gated=False, lean=("norm", "rotary")),
        Arch("nemotron", mlp_linears=UP_DOWN, gated=False, packs=False, lean=()),
        Arch("starcoder2", mlp_linears=("c_fc", "c_proj"), gated=False, lean=("rotary",)),
        Arch(
            "stablelm",
            parallel=lambda config: config.use_parallel_residual,
            kv_groups_stay="some of its models have a norm for each head",
            lean=("mlp", "rotary"),
        ),
        Arch(
            "cohere2",
            parallel=_side_by_side,
            mlp_norms=(),
            logit_scale=lambda config: config.logit_scale,
            lean=("mlp",),
        ),
        Arch(
            "cohere",
            parallel=_side_by_side,
            mlp_norms=(),
            logit_scale=lambda config: config.logit_scale,
            kv_groups_stay="some of its models have a norm for each head",
            lean=("mlp",),
        ),
        Arch(
            "phi",
            parallel=_side_by_side,
            norm="model.final_layernorm",
            attention_linears=("q_proj", "k_proj", "v_proj", "dense"),
            mlp_linears=("fc1", "fc2"),
            mlp_norms=(),
            gated=False,
            lean=("rotary",),
        ),
        Arch(
            "gpt_neox",
            blocks="gpt_neox.layers",
            attention="attention",
            norm="gpt_neox.final_layer_norm",
            embed="gpt_neox.embed_in",
            parallel=_side_by_side,
            attention_linears=("query_key_value", "dense"),
            mlp_linears=("dense_h_to_4h", "dense_4h_to_h"),
            gated=False,
            kv_groups_stay="q, k and v are one linear, cut by head counts of the config, which both views share",
            lean=(),
        ),
        *(
            Arch(
                name,
                blocks="transformer.h",
                attention="attn",
                norm="transformer.ln_f",
                embed="transformer.wte",
                attention_linears=("c_attn", "c_proj"),
                attention_norms=("ln_1",),
                mlp_linears=("c_fc", "c_proj"),
                mlp_norms=("ln_2",),
                gated=False,
                neurons="n_inner",
                unlike=unlike,
                kv_groups_stay="its heads are together as wide as the model, whatever a config says",
                lean=(),
            )
            for name, unlike in (("gpt2", _by_number), ("gpt_bigcode", _crossing))
        ),
        Arch(
            "lfm2",
            norm="model.embedding_norm",
            attention_linears=("q_proj", "k_proj", "v_proj", "out_proj"),
            attention_norms=("operator_norm",),
            mlp="feed_forward",
            mlp_linears=("w1", "w3", "w2"),
            mlp_norms=("ffn_norm",),
            mixer="conv",
            mixer_linears=("in_proj", "out_proj"),
            packs=False,
            kv_groups_stay=MIXED,
            lean=("norm", "rotary"),
        ),
        Arch(
            "qwen3_5_text",
            mixer="linear_attn",
            mixer_linears=("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
            packs=False,
            kv_groups_stay=MIXED,
            lean=("mlp",),
        ),
        Arch(
            "qwen3_next",
            mixer="linear_attn",
            mixer_linears=("in_proj_qkvz", "in_proj_ba", "out_proj"),
            packs=False,
            kv_groups_stay=MIXED,
            experts=ExpertNames(shared="shared_expert", width="moe_intermediate_size", count="num_experts"),
            lean=("mlp",),
        ),
        Arch(
            "granitemoehybrid",
            logit_scale=lambda config: 1.0 / config.logits_scaling,
            mlp="shared_mlp",
            mlp_linears=("input_linear", "output_linear"),
            neurons="shared_intermediate_size",
            mixer="mamba",
            mixer_linears=("in_proj", "out_proj"),
            packs=False,
            kv_groups_stay=MIXED,
            unlike=_with_experts,
            lean=("norm", "rotary"),
        ),
        Arch(
            "falcon_h1",
            norm="model.final_layernorm",
            logit_scale=lambda config: config.lm_head_multiplier,
            mlp="feed_forward",
            mlp_norms=("pre_ff_layernorm",),
            mixer="mamba",
            mixer_linears=("in_proj", "out_proj"),
            unadapted=("out_proj",),
            packs=False,
            kv_groups_stay=MIXED,
            lean=("norm", "rotary"),
        ),
        Arch(
            "nemotron_h",
            norm="model.norm_f",
            embed="model.embeddings",
            **dict.fromkeys(("attention", "mixer", "mlp"), "mixer"),
            mlp_linears=UP_DOWN,
            gated=False,
            attention_norms=("norm",),
            mlp_norms=("norm",),
            mixer_linears=("in_proj", "out_proj"),
            unadapted=("out_proj",),
            packs=False,
            lone=True,
            unlike=_with_experts_in_blocks,
            kv_groups_stay=MIXED,
        ),
        *(
            Arch(
                f"gemma4{name}",
                softcap=_final_softcap,
                attention_norms=(*AROUND["attention_norms"], "layer_scalar"),  # a factor on the stream behind a block
                mlp_norms=AROUND["mlp_norms"],
                norm_behind=True,
                whole=True,
                last_stays=True,
                unlike=_with_parts_of_blocks,
                kv_groups_stay="its blocks differ in the sizes of their heads",
                lean=("mlp",),
            )
            for name in ("_text", "_unified_text")
        ),
        Arch(
            "apertus",
            mlp_linears=UP_DOWN,
            gated=False,
            attention_norms=("attention_layernorm",),
            mlp_norms=("feedforward_layernorm",),
            lean=("norm", "rotary"),
        ),
        Arch("mixtral", experts=ExpertNames()),
        Arch("olmoe", kv_groups_stay=ALL_HEADS, experts=ExpertNames()),
        Arch("qwen3_moe", experts=ExpertNames(width="moe_intermediate_size")),
        Arch("gpt_oss", kv_groups_stay=SINKS, experts=ExpertNames(router="router", gives_scores=True), lean=()),
        Arch(
            "glm4_moe",
            experts=ExpertNames(shared="shared_experts", width="moe_intermediate_size", grouped=True),
            lean=("norm", "mlp"),
        ),
        Arch(
            "deepseek_v3",
            attention_linears=("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
            kv_groups_stay="its heads share keys and values that are compressed (MLA)",
            experts=ExpertNames(shared="shared_experts", width="moe_intermediate_size", grouped=True),
        ),
    )
}


def register(arch: Arch) -> Arch:
    """Make a family of another package known. Raises ValueError if there is a row of its model type."""
    if arch.model_type in ARCHS:
        raise ValueError(f"model type {arch.model_type!r}: there is a row of it already")
    ARCHS[arch.model_type] = arch
    return arch


def base_of(model: nn.Module) -> PreTrainedModel:
    """The causal LM itself, unwrapped if peft holds it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[return-value, operator]


def arch_of(model: PretrainedConfig | nn.Module) -> Arch:
    """The row of this model or config. Raises ModelError: it has none, what it is, and what to do."""
    config: Any = model if isinstance(model, PretrainedConfig) else base_of(model).config
    arch = ARCHS.get(config.model_type)
    return arch_of_config(config.to_dict()) if arch is None or arch.unlike(vars(config)) else arch


def arch_of_config(config: Mapping[str, Any]) -> Arch:
    """The row for a raw config. Raises ModelError: it has none, what it is, and what to do."""
    if config.get("model_type") not in ARCHS:
        raise ModelError(unsupported(config, ARCHS))
    arch = ARCHS[str(config["model_type"])]
    if reason := arch.unlike(config):
        raise ModelError(
            f"this model of type '{arch.model_type}' is not supported: {reason}. `recover families` says more"
        )
    return arch


def neurons_of(config: PretrainedConfig) -> int:
    """Neurons of a plain MLP; four times the width where the config says null (GPT-2)."""
    return getattr(config, arch_of(config).neurons) or 4 * config.hidden_size


def kv_heads_of(config: PretrainedConfig) -> int:
    """Key-value heads of a block (the first one, where they differ): as many as query heads where none are named."""
    return getattr(_of_first(config), "num_key_value_heads", None) or config.num_attention_heads


def head_size_of(config: PretrainedConfig) -> int:
    """Rows of one attention head (of the first block, where they differ)."""
    return getattr(_of_first(config), "head_dim", None) or config.hidden_size // config.num_attention_heads


def _of_first(config: Any) -> Any:
    """The settings of the first block: transformers refuses to say of all what differs between them."""
    single = vars(config).get("per_layer_config") or getattr(type(config), "per_layer_config", None)
    return config.per_layer_config[0] if single else config


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks, in dense order."""
    return base_of(model).get_submodule(arch_of(model).blocks)  # type: ignore[return-value]


def final_norm_of(model: nn.Module) -> nn.Module:
    """The norm between the last block and the head."""
    return base_of(model).get_submodule(arch_of(model).norm)


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer of every block, by its module name in the stock model (also where peft has wrapped it)."""
    arch, base = arch_of(model), base_of(model)
    names = [
        f"{arch.blocks}.{index}.{name}"
        for index, block in enumerate(blocks_of(model))
        for part in SUBLAYERS
        for name in linears_in(block, arch, part)
    ]
    modules = {name: base.get_submodule(name) for name in names}
    return {name: getattr(module, "base_layer", module) for name, module in modules.items()}  # type: ignore[misc]


def sublayers_in(block: nn.Module, arch: Arch) -> tuple[Sublayer, ...]:
    """The sublayers that a block has: both, or the one that it is."""
    if not arch.lone:
        return SUBLAYERS
    return ("mlp",) if kind_in(block, arch, arch.mlp) == "mlp" else ("attention",)


def lone_of(model: nn.Module) -> tuple[Sublayer, ...]:
    """Of a model whose blocks are one sublayer each, which one each is; of others nothing."""
    arch = arch_of(model)
    return tuple(sublayers_in(block, arch)[0] for block in blocks_of(model)) if arch.lone else ()


def kind_in(block: nn.Module, arch: Arch, name: str) -> Literal["attention", "mixer", "mlp"]:
    """What the module of this name inside the block is; of a block that is one sublayer, by the linears that it has."""
    if not arch.lone:
        kinds: dict[str, Any] = {arch.mixer: "mixer", arch.attention: "attention", arch.mlp: "mlp"}
        return kinds[name]
    inside = block.get_submodule(name)._modules
    if arch.attention_linears[0] in inside:
        return "attention"
    return "mixer" if arch.mixer_linears[0] in inside else "mlp"


def modules_in(block: nn.Module, arch: Arch, part: Sublayer) -> list[str]:
    """Names inside the block of what a sublayer runs: of the first, attention, the mixer in its place, or both.

    None of a sublayer that the block has not.
    """
    if arch.lone:
        return [arch.mlp] if part in sublayers_in(block, arch) else []
    if part == "mlp":
        return [arch.mlp]
    return [name for name in (arch.attention, arch.mixer) if name and name in block._modules] or [arch.attention]


def linears_in(block: nn.Module, arch: Arch, part: Sublayer) -> list[str]:
    """Names inside the block of a sublayer's linear layers; of each module the last writes to the residual stream."""
    linears = {"mixer": arch.mixer_linears, "attention": arch.attention_linears, "mlp": arch.mlp_linears}
    names = modules_in(block, arch, part)
    kinds = {name: kind_in(block, arch, name) for name in names}
    if part == "mlp" and mixture_in(arch, block):  # those of a mixture are its shared experts'
        assert arch.experts is not None
        names = [f"{arch.mlp}.{arch.experts.shared}"] if arch.experts.shared else []
        kinds = dict.fromkeys(names, "mlp")
    inside = {name: block.get_submodule(name) for name in names}
    return [
        f"{name}.{linear}"
        for name, module in inside.items()
        for linear in linears[kinds[name]]
        if module._modules.get(linear) is not None  # what a config leaves out; in Gemma 4 keys may be values too
    ]


def attending(model: nn.Module) -> list[Site]:
    """The sublayers that attend, and not by a state alone; they tell how many tokens a cache has."""
    arch = arch_of(model)
    return [Site(index, "attention") for index, block in enumerate(blocks_of(model)) if attends(block, arch)]


def attends(block: nn.Module, arch: Arch) -> bool:
    """Whether the block has keys and values, and not a state alone."""
    return any(kind_in(block, arch, name) == "attention" for name in modules_in(block, arch, "attention"))


def staying(model: nn.Module) -> set[Site]:
    """What cannot go beside the attention of block 0."""
    arch = arch_of(model)
    last = {Site(len(blocks_of(model)) - 1, "attention")} if arch.last_stays else set()
    return last | set(attending(model)[:1])


def expert_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(outputs of all experts one after the other, inputs) of every matrix of experts, by its stock name."""
    arch = arch_of(model)
    found: dict[str, tuple[int, int]] = {}
    for index, block in enumerate(blocks_of(model)):
        if arch.experts is None or not mixture_in(arch, block):
            continue
        experts: Any = block.get_submodule(f"{arch.mlp}.{arch.experts.experts}")
        while hasattr(experts, "base_layer"):
            experts = experts.base_layer
        for name in GATE_UP:
            count, *sides = getattr(experts, name).shape
            outputs, inputs = reversed(sides) if experts.is_transposed else sides
            found[f"{arch.blocks}.{index}.{arch.mlp}.{arch.experts.experts}.{name}"] = (count * outputs, inputs)
    return found


def mixture_in(arch: Arch, block: nn.Module) -> bool:
    """Whether the MLP of this block is a mixture of experts."""
    return arch.experts is not None and hasattr(block.get_submodule(arch.mlp), arch.experts.experts)


def experts_of(config: PretrainedConfig) -> tuple[int, int]:
    """How many experts a mixture of this model has, and how many of them a token goes through; (0, 0) without one."""
    names, settings = arch_of(config).experts, cast(Any, config)
    return (0, 0) if names is None else (getattr(settings, names.count), settings.num_experts_per_tok)


def groups_of(config: PretrainedConfig) -> tuple[int, int]:
    """From how many groups of experts this model's routers choose, and from how many of them for one token."""
    names, settings = arch_of(config).experts, config
    if names is None or not names.grouped:
        return 1, 1
    return getattr(settings, "n_group", None) or 1, getattr(settings, "topk_group", None) or 1


def writes_out(arch: Arch, inside: str) -> bool:
    """Whether a tensor, by its name inside the block, is of what a sublayer writes to the residual stream with."""
    module, _, name = inside.rpartition(".")
    if module in arch.last_linears:
        return True
    last, mixture = arch.mlp_linears[-1], arch.experts
    if mixture is not None and module == f"{arch.mlp}.{mixture.experts}":
        return name.removesuffix("_bias") == last
    return mixture is not None and module == f"{arch.mlp}.{mixture.shared}.{last}"


def site_of(model: nn.Module, name: str) -> Site:
    """The sublayer that a linear layer (by its module name) belongs to."""
    arch = arch_of(model)
    match = re.match(re.escape(arch.blocks) + r"\.(\d+)\.(\w+)\.", name)
    assert match, name
    return Site(int(match[1]), part_of(arch, match[2], blocks_of(model)[int(match[1])]))


def block_of(name: str) -> int:
    """The block that a module belongs to, by its full name: the first number in it."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def part_of(arch: Arch, inside: str, block: nn.Module) -> Sublayer:
    """The sublayer that a tensor or module belongs to, by its name inside the block."""
    first = inside.partition(".")[0]
    if arch.lone:
        return sublayers_in(block, arch)[0]
    if first in (arch.attention, arch.mixer or arch.attention) or first in arch.attention_norms:
        return "attention"
    if first == arch.mlp or first in arch.mlp_norms:
        return "mlp"
    raise ModelError(
        f"{arch.model_type}: '{inside}' of a block belongs to no sublayer: complete its row in recover/models/arch.py"
    )


def head_of(model: nn.Module) -> Head:
    """z = scale * (h W^T + bias), then softcap * tanh(z / softcap) if there is one."""
    arch, base = arch_of(model), base_of(model)
    head: Any = base.get_submodule(arch.head)
    return Head(head.weight, head.bias, float(arch.logit_scale(base.config)), arch.softcap(base.config))


def middle_hooks(block: nn.Module, arch: Arch, act: Callable[[Tensor], Any]) -> list[Any]:
    """Call `act` with the stream behind the attention of a block that runs it beside the MLP: no module reads it."""
    entering: list[Tensor] = []

    def enter(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering[:] = [args[0] if args else kwargs["hidden_states"]]

    def behind(_module: Any, _args: Any, output: Any) -> None:
        act(entering[0] + (output[0] if isinstance(output, tuple) else output))

    return [
        block.register_forward_pre_hook(enter, with_kwargs=True),
        block.get_submodule(arch.attention).register_forward_hook(behind),
    ]


# Names of a KV cache among the keywords of a forward. Where two are taken, the first is the one that is not deprecated:
# `cache` since transformers 5.24. GPT-NeoX's blocks have a name of their own, and so have mixers before 5.24.
CACHE_NAMES = ("cache", "past_key_values", "layer_past", "cache_params")


@functools.cache
def cache_name(kind: type[nn.Module]) -> str:
    """The keyword under which forwards of this class take a KV cache; raises ModelError if it is none of CACHE_NAMES.

    A forward swallows keywords that it does not know, and then decodes without a cache and without an error. So the
    name is read from its signature, and never told by transformers' version: families are renamed one by one.
    """
    taken = inspect.signature(kind.forward).parameters  # behind decorators and the twin's class too
    for name in CACHE_NAMES:
        if name in taken:
            return name
    raise ModelError(
        f"{kind.__module__}.{kind.__qualname__}: its forward takes {', '.join([*taken][1:])}; expected a KV cache "
        f"under one of the names {', '.join(CACHE_NAMES)}. Use another version of transformers, or add the name to "
        f"{__name__}"
    )


def taking_cache(model: nn.Module, cache: Any) -> dict[str, Any]:
    """What to call the causal LM with so that it takes this cache (None: it makes one of its own, if it is to)."""
    return {cache_name(type(base_of(model))): cache}


def cache_in(output: Any) -> Any:
    """The cache in what a model gave back, None if it kept none."""
    return output.cache if hasattr(output, "cache") else output.past_key_values


def cache_among(keywords: Mapping[str, Any], others: Sequence[Any] = ()) -> Any:
    """The cache among the keywords of a call, or its `others`, given by place (GPT-2); None if there is none."""
    named = (keywords[name] for name in CACHE_NAMES if keywords.get(name) is not None)
    return next(named, next((each for each in others if isinstance(each, Cache)), None))


def conv1d_weights(model: nn.Module) -> frozenset[str]:
    """Names of the weights that the model stores as (I, O): those of GPT-2's `Conv1D`, a linear layer in all else."""
    return frozenset(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D))


def as_linears(model: nn.Module) -> frozenset[str]:
    """Put an `nn.Linear` in the place of each `Conv1D`, with the weight turned round; the names of the turned weights.

    In memory too: DeepSpeed, stores and kernels take rows that lie one behind the other. Sums are rounded in another
    order than in the stock model for that. `merge` turns the weights back.
    Raises ModelError where weights were dealt out over processes before (ZeRO-3 from the first byte).
    """
    turned = conv1d_weights(model)
    for name in turned:
        parent, _, last = name.removesuffix(".weight").rpartition(".")
        stock: Any = model.get_submodule(parent).get_submodule(last)
        if zero.dealt_out(stock.weight):
            raise ModelError(
                "DeepSpeed ZeRO-3 deals out this model's weights, and its Conv1D layers are taken as linear ones: "
                "launch with launch/zero2.yaml or launch/gpu.yaml (train.shard_weights)"
            )
        linear = nn.Linear(stock.nx, stock.nf, device="meta")
        linear.weight = nn.Parameter(stock.weight.detach().T.contiguous(), requires_grad=stock.weight.requires_grad)
        linear.bias = stock.bias
        setattr(model.get_submodule(parent), last, linear.train(stock.training))
    return turned
