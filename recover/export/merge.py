"""A stock model out of a twin: what is dropped is gone, LoRA merged, masked weights exactly zero.

Shapes: O out features, I in features, R rank.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import accelerate
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from recover.base import console
from recover.base.errors import ExportError
from recover.maths.divergence import all_finite
from recover.models.arch import conv1d_weights, part_of, writes_out
from recover.models.experts import IN, OUT, ExpertFactors, SwitchedExperts, expert_mask
from recover.models.masked_lora import ExpertLora, TrainedCopy, adapted_tensors, expert_factors
from recover.models.stored_weights import comes_and_goes, present
from recover.models.switched import Factors, MaskedLinear, effective_weight, pruned_tensor
from recover.models.wrapper import remember, wrapped_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from recover.models.plan import Plan
    from recover.models.site import Packed
    from recover.models.twin import Twin

# Lists of a config that are as long as they like, and may by chance be as long as the model is deep.
NOT_PER_BLOCK = re.compile(
    r"architectures|mtp_.*|.*token_ids?|.*_ids|id2label|label2id|mlp_only_layers|.*_multipliers|time_step_limit"
)

EXPERTS_AT_ONCE = 8


@torch.no_grad()
def merge(twin: Twin, dtype: torch.dtype) -> PreTrainedModel:
    """The pruned view as a stock model of `dtype` on the CPU, in eval mode: `save_pretrained` gives a stock checkpoint.

    W' = (W + s B A) * keep is computed in fp32 and cast once (merged in bf16, logits were off by 0.047 of 5.25). Blocks
    are removed and what counts blocks is renumbered. Weights that do not change share memory with the twin where device
    and dtype allow it: a merge needs one copy more at most, and never the whole model in fp32.

    Raises ExportError when a masked weight is not zero, a weight is not finite in `dtype`, or LoRA sits on a dropped
    block.
    """
    stock = unfilled(twin)
    stock.load_state_dict(dict(tensors(twin, stock, dtype)), strict=True, assign=True)
    stock.tie_weights()
    return stock.requires_grad_(False).eval()


def unfilled(twin: Twin) -> PreTrainedModel:
    """The stock model that `merge` fills: its parameters have no memory, its buffers are real."""
    config = pruned_config(twin.base.config, twin.plan)
    _warn_of_irregular_attention(twin.base.config, config)
    # Parameters on `meta`, buffers (rotary frequencies are in no state dict) made by the constructor as anywhere else.
    with accelerate.init_empty_weights(), no_init_weights():  # to draw values on `meta` takes five times the rest
        stock = AutoModelForCausalLM.from_config(config, attn_implementation=twin.base.config._attn_implementation)
    stock.tie_weights()
    stock.generation_config = copy.deepcopy(twin.base.generation_config)
    remember(stock, wrapped_of(twin.base))
    return stock


def one_by_one(twin: Twin, dtype: torch.dtype) -> tuple[PreTrainedModel, Iterator[tuple[str, Tensor]]]:
    """As `merge`, for what need not be in memory at once: a model without memory, and its tensors."""
    stock = unfilled(twin)
    pairs = tensors(twin, stock, dtype)
    for name, parameter in stock.named_parameters():
        parameter.data = parameter.data.to(_kept_dtype(stock, name, dtype))
    return stock, pairs


def tensors(twin: Twin, stock: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each tensor of `stock` (of `unfilled`), one after the other. Raises as `merge` does."""
    learnt = set(adapted_tensors(twin.base))
    names, turned = _dense_names(stock, twin), conv1d_weights(stock)
    for name, (dense_name, zeroed) in console.track(names.items(), "merge", unit="tensors"):
        with torch.no_grad():
            tensor, used = _merged(twin, dense_name, _kept_dtype(stock, name, dtype))
        tensor = tensor.T.contiguous() if name in turned else tensor
        yield name, torch.zeros_like(tensor) if zeroed else tensor
        learnt -= used
    if learnt:
        lost = f"{sorted(learnt)[0]} and {len(learnt) - 1} other tensors"
        raise ExportError(f"{lost} were learnt and are in no exported tensor: report it, with the version of peft")


def pruned_config(config: PretrainedConfig, plan: Plan) -> PretrainedConfig:
    """The config of the exported model: that of the dense one, for the blocks and sizes that the plan leaves.

    Every list with one entry a block (`layer_types`, SmolLM3's `no_rope_layers`) is indexed by the dense block that
    each exported block's attention comes from; `max_window_layers` (Qwen2: blocks from there on slide) counts those
    below it; which blocks have a mixture of experts is said by where their MLPs come from. Left stale, a checkpoint
    does not load, or loads with other attention.
    """
    sources = [packed.source for packed in plan.packed]
    mlps = [packed.source if packed.mlp is None else packed.mlp for packed in plan.packed]
    values = config.to_dict()
    blocks = config.num_hidden_layers
    for name, value in values.items():
        if isinstance(value, list) and len(value) == blocks and not NOT_PER_BLOCK.fullmatch(name):
            values[name] = [value[block] for block in sources]
    if values.get("per_layer_config"):  # Gemma 4: sizes of heads, by number of a block
        known = {int(number): sizes for number, sizes in values["per_layer_config"].items()}
        values["per_layer_config"] = {at: known[block] for at, block in enumerate(sources) if block in known}
    if isinstance(values.get("max_window_layers"), int):
        values["max_window_layers"] = sum(block < values["max_window_layers"] for block in sources)
    if values.get("full_attn_idxs") is not None:  # LFM2 as it was first published
        values["full_attn_idxs"] = [at for at, block in enumerate(sources) if block in config.full_attn_idxs]
    values |= _mixture_fields(values, mlps)
    values[type(config).attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(sources)
    values["use_cache"] = True  # training may have switched it off
    values.update(plan.config)
    for stale in ("quantization_config", "sparsity_config", "transformers_version"):
        values.pop(stale, None)  # of how the dense weights were stored; vLLM refuses a sparsity_config
    return type(config).from_dict(values)


def _mixture_fields(values: Mapping[str, Any], mlps: list[int]) -> dict[str, Any]:
    """What says which blocks have a plain MLP, and how many heads predict further tokens, for MLPs of these blocks.

    Such heads (MTP) are no part of the causal LM that was loaded, so the export has none.
    """
    found: dict[str, Any] = {}
    if isinstance(plain := values.get("mlp_only_layers"), list):
        step = values["decoder_sparse_step"]
        kept = [new for new, block in enumerate(mlps) if block in plain or (block + 1) % step]
        found |= {"mlp_only_layers": kept, "decoder_sparse_step": 1}
    if isinstance(first := values.get("first_k_dense_replace"), int):
        found["first_k_dense_replace"] = sum(block < first for block in mlps)
    if values.get("num_nextn_predict_layers"):
        console.say("export: heads that predict further tokens (MTP) are not loaded, and the export has none")
        found["num_nextn_predict_layers"] = 0
    return found


def _warn_of_irregular_attention(dense: PretrainedConfig, pruned: PretrainedConfig) -> None:
    """transformers reads the list of layer types; readers that know a period only (llama.cpp, Gemma) misread others."""
    before, after = getattr(dense, "layer_types", None) or [], getattr(pruned, "layer_types", None) or []
    period = next((p for p in range(1, len(before)) if before[p:] == before[:-p]), len(before))
    if period < len(before) and after != (before[:period] * len(after))[: len(after)]:
        text = f"the kept blocks no longer alternate attention every {period} blocks as {dense.model_type} does"
        console.warn(f"export: {text}: llama.cpp may misread them")


def _kept_dtype(stock: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """The export's dtype, float32 for what this class computes with in float32 whatever dtype it is loaded in."""
    patterns = getattr(stock, "_keep_in_fp32_modules_strict", None) or ()
    return torch.float32 if any(re.search(pattern, name) for pattern in patterns) else dtype


def _dense_names(stock: PreTrainedModel, twin: Twin) -> dict[str, tuple[str, bool]]:
    """For each tensor of the stock model, the dense one it is made of, and whether it is zeroed.

    Sublayers come from the dense blocks that the plan packs together. Of a missing sublayer only the last linear is
    zeroed: then it adds nothing, whatever the rest of it holds.
    """
    block = re.compile(re.escape(twin.arch.blocks) + r"\.(\d+)\.(.*)")
    names = {}
    for name in stock.state_dict():
        match = block.fullmatch(name)
        names[name] = _inside(twin, twin.plan.packed[int(match[1])], match[2]) if match else (name, False)
    _refuse_lora_elsewhere(twin, {dense for dense, zeroed in names.values() if not zeroed})
    return names


def _inside(twin: Twin, packed: Packed, inside: str) -> tuple[str, bool]:
    arch = twin.arch
    part = part_of(arch, inside, twin.blocks[packed.source])
    kept = packed.attention if part == "attention" else packed.mlp
    zeroed = kept is None and writes_out(arch, inside)
    return f"{arch.blocks}.{packed.source if kept is None else kept}.{inside}", zeroed


def _refuse_lora_elsewhere(twin: Twin, merged: set[str]) -> None:
    lost = [name for name in adapted_tensors(twin.base) if name not in merged]
    if lost:
        raise ExportError(
            f"LoRA sits on {lost[0].removesuffix('.weight')} and {len(lost) - 1} other layers that the pruned model "
            "does not have"
        )


def _merged(twin: Twin, name: str, dtype: torch.dtype) -> tuple[Tensor, set[str]]:
    """One tensor of the pruned view, cast once, on the CPU; and its name if what was learnt is in it."""
    module: Any = twin.base.get_submodule(name.rpartition(".")[0])
    learnt = isinstance(module, TrainedCopy)
    if isinstance(module, TrainedCopy):
        module = module.seen()
    linear: Any = module.get_base_layer() if isinstance(module, ExpertLora) else getattr(module, "base_layer", module)
    with present(*linear.parameters(recurse=False)):
        merged, updated = _cast(twin, name, module, linear, dtype)
        if any(map(comes_and_goes, linear.parameters(recurse=False))):
            merged = merged.clone()  # out of memory that goes
    return merged, {name} if learnt or updated else set()


def _cast(twin: Twin, name: str, module: Any, linear: Any, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """The tensor, and whether an update of low rank is in it. `linear`: what `module` adapts, or itself."""
    path, _, cfg = name.rpartition(".")
    tensor, learnt = pruned_tensor(linear, cfg), False
    if isinstance(module, ExpertLora) and cfg in (factors := expert_factors(module)):
        before = tensor
        tensor, learnt = _with_updates(before, factors[cfg], linear.is_transposed), True
        _check_updates(name, tensor, before, module)
    if cfg == "weight" and isinstance(linear, nn.Linear):
        factors = _factors(module, name)
        tensor, learnt = _effective(linear, factors), factors is not None
    masked = expert_mask(linear, cfg) if isinstance(linear, SwitchedExperts) and cfg in (IN, OUT) else None
    if masked is not None:
        tensor = tensor.masked_fill(~(masked.transpose(1, 2) if linear.is_transposed else masked), 0)
    tensor = _left(twin, path, tensor)
    merged = tensor.to(dtype) if tensor.is_floating_point() else tensor  # judged where it lies: a GPU's memory is fast
    if not all_finite(merged):
        raise ExportError(f"{name}: not finite in {dtype}: export in a wider dtype, or look at the training log")
    if cfg == "weight" and isinstance(linear, MaskedLinear):
        _certify(name, merged, linear.keep, twin)
    if masked is not None:
        matrix_OI = (merged.transpose(1, 2) if linear.is_transposed else merged).flatten(0, 1)
        _certify(name, matrix_OI, masked.flatten(0, 1), twin)
    return merged.cpu(), learnt


def _left(twin: Twin, path: str, tensor: Tensor) -> Tensor:
    """Of a tensor of routers or experts, the rows of those that stay; others as they are."""
    match = re.match(re.escape(f"{twin.arch.blocks}.") + rf"(\d+)\.{twin.arch.mlp}\.(.+)", path)
    parts = twin.arch.experts
    if match is None or parts is None or match[2] not in (parts.router, parts.experts):
        return tensor
    kept = twin.plan.experts.get(int(match[1]))
    return tensor if kept is None else tensor[torch.tensor(kept, device=tensor.device)]


def _effective(linear: nn.Linear, factors: Factors | None) -> Tensor:
    weight_OI = pruned_tensor(linear, "weight")
    if isinstance(linear, MaskedLinear):
        return effective_weight(weight_OI, linear.keep_packed, factors)
    if factors is None:
        return weight_OI
    return weight_OI.float() + (factors.b_OR.float() @ factors.a_RI.float()) * factors.scaling


def _with_updates(stored: Tensor, factors: ExpertFactors, transposed: bool) -> Tensor:
    """Every expert's matrix with its update, in float32."""
    update_EOI = torch.bmm(factors.b_EOR.float(), factors.a_ERI.float()) * factors.scaling
    return stored.float() + (update_EOI.transpose(1, 2) if transposed else update_EOI)


def _check_updates(name: str, merged: Tensor, dense: Tensor, layer: Any) -> None:
    """Raise ExportError unless each expert has the update that peft's own code computes for it, to its rounding."""
    while layer.parameter_name != name.rpartition(".")[2]:
        layer = layer.base_layer
    (adapter,) = [each for each in layer.active_adapters if each in layer.lora_A]
    update = layer.get_delta_weight(adapter).detach()
    # A few experts at once: in float32 all of them take several times their memory. The GPU is waited for once.
    together = zip(*(each.split(EXPERTS_AT_ONCE) for each in (merged, dense, update)), strict=True)
    judged = torch.cat([_off_and_allowed(*three, made_in=update.dtype) for three in together], dim=1)
    for expert, (off, rounding, allowed) in enumerate(judged.T.tolist()):
        if not off <= allowed:
            raise ExportError(
                f"{name}: expert {expert} is off by {off:.3g} from its weight with what was learnt (rounding: "
                f"{rounding:.3g}): an update is lost or taken twice. Please report it, with the version of peft"
            )


def _off_and_allowed(found_EOI: Tensor, before_EOI: Tensor, update_EOI: Tensor, *, made_in: torch.dtype) -> Tensor:
    """[3, E]: how far each expert is from its weight and update, rounding of the update, and how far it may be."""
    off_E = (found_EOI - before_EOI.float() - update_EOI.float()).abs().amax((1, 2))
    rounding_E = 4 * torch.finfo(made_in).eps * update_EOI.abs().amax((1, 2)).float()
    stored_E = 4 * torch.finfo(torch.float32).eps * before_EOI.abs().amax((1, 2)).float()
    return torch.stack([off_E, rounding_E, rounding_E + stored_E])


def _factors(module: Any, name: str) -> Factors | None:
    """The active adapter of a LoRA layer, None for a layer without; raises ExportError unless there is just one."""
    if not hasattr(module, "base_layer"):
        return None
    active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
    if module.merged or module.disable_adapters or len(active) != 1:
        merged = module.merged_adapters
        raise ExportError(f"{name}: expected one active, unmerged adapter, found {active} (merged: {merged})")
    adapter = active[0]
    return Factors(
        module.lora_A[adapter].weight.detach(), module.lora_B[adapter].weight.detach(), module.scaling[adapter]
    )


def _certify(name: str, merged_OI: Tensor, keep_OI: Tensor, twin: Twin) -> None:
    record = twin.plan.masks[name.removesuffix(".weight")]
    keep_OI = keep_OI.to(merged_OI.device)
    alive = int(merged_OI.masked_fill(keep_OI, 0).count_nonzero())
    pruned = keep_OI.numel() - int(keep_OI.sum())
    if alive or pruned != record.zeros:
        raise ExportError(f"{name}: {alive} of {pruned} pruned weights are not zero; the plan prunes {record.zeros}")
