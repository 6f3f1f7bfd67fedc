"""Two checkpoints as a pair to probe: any of what `model.source` may be, and quantized ones, of one tokenizer."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recover.base import dist
from recover.base.errors import ModelError
from recover.config import recipe
from recover.models.arch import arch_of_config
from recover.models.load import UNPACKED, check_fit, load_model, load_tokenizer, read_whole, ready
from recover.models.source import locate, read_config
from recover.models.wrapper import wrapper_of
from recover.probe.views import Pair

# quant_method of a checkpoint -> the package that reads it (a GGUF file is converted, and needs none of them)
PACKAGES = {"awq": "gptqmodel", "gptq": "gptqmodel", "bitsandbytes": "bitsandbytes", "torchao": "torchao"}
SHOWN = 3  # tokens named in a message


def load_pair(
    dense: recipe.Model, other: recipe.Model, numbers: Sequence[int] | None = None
) -> tuple[Pair, PreTrainedTokenizerBase]:
    """Both models on this process's device, and the dense one's tokenizer; `numbers` as in `Pair.of_models`.

    Raises ModelError: a model cannot be loaded, needs a package that is not there, or the two differ in tokenizer, in
    vocabulary, or in depth without a mapping.
    """
    tokenizer = load_tokenizer(dense)
    check_tokenizers(tokenizer, load_tokenizer(other), other.source)
    first, second = load_any(dense), load_any(other)
    for model in (first, second):
        check_fit(model, tokenizer)
    return Pair.of_models(first, second, numbers), tokenizer


def load_any(cfg: recipe.Model) -> PreTrainedModel:
    """The model on this process's device, as `load_model` has it, or with the quantization that its config names.

    Raises ModelError as `load_model` does, and for a quantization whose package is not installed or unknown here.
    """
    config = read_config(cfg)
    quantization = config.get("quantization_config")
    if quantization is None or dict(quantization).get("quant_method") in UNPACKED:
        return ready(load_model(cfg))
    _check_package(cfg.source, str(dict(quantization).get("quant_method")))
    if wrapper_of(config) is not None:
        raise ModelError(
            f"{cfg.source}: a quantized text model inside a wrapper ('{config['model_type']}'), of which the parts are "
            "not told apart: give the checkpoint that it was made from"
        )
    arch_of_config(config)
    return read_whole(
        cfg,
        locate(cfg),
        refused=("missing_keys",),  # a quantizer may leave tensors behind that it does not read
        attn_implementation=cfg.attention,
        device_map={"": dist.device()},  # quantized weights are not moved afterwards
    )


def _check_package(source: str, method: str) -> None:
    if method not in PACKAGES:
        known = ", ".join((*PACKAGES, *UNPACKED))
        raise ModelError(f"{source}: quantized with '{method}'; expected one of {known}, a GGUF file, or none")
    package = PACKAGES[method]
    if importlib.util.find_spec(package) is None:
        raise ModelError(
            f"{source}: quantized with '{method}', which the package '{package}' reads, and it is not installed: "
            f"pip install {package}"
        )


def check_tokenizers(
    dense: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, source: str = "the other model"
) -> None:
    """Every id means one token in both (either may have tokens added at the end), or raise ModelError."""
    first, second = ({number: token for token, number in each.get_vocab().items()} for each in (dense, other))
    differing = [number for number in sorted(first.keys() & second.keys()) if first[number] != second[number]]
    if differing:
        shown = ", ".join(f"{number} is {first[number]!r} and {second[number]!r}" for number in differing[:SHOWN])
        raise ModelError(
            f"{source}: another tokenizer than the dense model's: {len(differing)} ids are different tokens ({shown}); "
            "expected two checkpoints of one tokenizer"
        )
