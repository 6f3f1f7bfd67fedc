"""What tests of the twin share: a reference without its code, and twins whose masks and adapters matter."""

from __future__ import annotations

import copy

import torch
from cached import cached
from transformers import AutoModelForCausalLM, PreTrainedModel

from recover.models.arch import linears_of
from recover.models.plan import MaskRecord, Plan
from recover.models.twin import Twin


def removed(model: PreTrainedModel, dropped: tuple[int, ...]) -> PreTrainedModel:
    """A stock model built anew without these blocks: the reference, which shares no code with the twin."""
    keep = [i for i in range(model.config.num_hidden_layers) if i not in dropped]
    config = copy.deepcopy(model.config)
    values = config.to_dict()
    for name, value in values.items():
        if isinstance(value, list) and len(value) == model.config.num_hidden_layers:
            values[name] = [value[i] for i in keep]
    if values.get("per_layer_config"):
        sizes = {int(block): each for block, each in values["per_layer_config"].items()}
        values["per_layer_config"] = {new: sizes[old] for new, old in enumerate(keep) if old in sizes}
    if "mlp_only_layers" in values:  # of the new blocks, those that are plain in the model itself
        plain = [i for i, block in enumerate(model.model.layers) if not hasattr(block.mlp, "experts")]
        values |= {"mlp_only_layers": [keep.index(i) for i in plain if i in keep], "decoder_sparse_step": 1}
    if "first_k_dense_replace" in values:
        values["first_k_dense_replace"] -= sum(i < values["first_k_dense_replace"] for i in dropped)
    values["n_layer" if "n_layer" in values else "num_hidden_layers"] = len(keep)
    smaller = AutoModelForCausalLM.from_config(type(config).from_dict(values), dtype=torch.float32).eval()
    weights = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if parts[1] in ("layers", "h"):
            if int(parts[2]) in dropped:
                continue
            parts[2] = str(keep.index(int(parts[2])))
        weights[".".join(parts)] = value
    smaller.load_state_dict(weights)
    return smaller


@torch.no_grad()
def stepwise(model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits through the KV cache: a prefill of 9 tokens, then 4 at once, then one at a time."""
    logits, seen, before = [], 0, {}
    for until in (9, 13, *range(14, input_ids.shape[1] + 1)):
        out = model(input_ids[:, seen:until], attention_mask=mask[:, :until], use_cache=True, **before)
        before, seen = cached(out), until
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def random_masks(model: PreTrainedModel, names: list[str] | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    linears = linears_of(model)
    return {name: torch.rand(linears[name].weight.shape, generator=generator) > 0.5 for name in names or linears}


def masked_twin(model: PreTrainedModel) -> Twin:
    masks = random_masks(model)
    records = {name: MaskRecord.of(keep, "unstructured") for name, keep in masks.items()}
    return Twin(model, Plan("magnitude", 6, masks=records), masks)


def fill_adapters(twin: Twin) -> None:
    """Give every LoRA matrix random values, so that it matters."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in twin.model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


class Distill:
    """Both passes in one forward, as in training; the sum of squares stands for the loss."""

    def __init__(self, twin: Twin) -> None:
        self.twin = twin

    def run(self, model, *, input_ids, attention_mask, labels):
        with self.twin.dense() as dense:
            target = dense(input_ids, attention_mask=attention_mask).logits
        return {"loss": (model(input_ids, attention_mask=attention_mask).logits - target).square().sum()}
