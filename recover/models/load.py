"""A recipe's model and tokenizer, loaded whole or refused by name: nothing is filled in at random or guessed."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    FineGrainedFP8Config,
    GenerationConfig,
    Mxfp4Config,  # pyright: ignore[reportAttributeAccessIssue]
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import GENERATION_CONFIG_NAME

from recover.base import console, dist
from recover.base.artifacts import JsonObject
from recover.base.errors import ModelError
from recover.base.memory import Mixture, Shape
from recover.config import recipe
from recover.config.base import Dtype
from recover.models import tokenizers
from recover.models.arch import (
    arch_of,
    arch_of_config,
    as_linears,
    attending,
    blocks_of,
    experts_of,
    groups_of,
    head_size_of,
    kv_heads_of,
    lone_of,
    mixture_in,
    neurons_of,
)
from recover.models.attention import by_rows
from recover.models.gate import unchanged
from recover.models.settings import config_of, keep_known
from recover.models.site import Sublayer
from recover.models.source import (
    CONFIG,
    check_numbers,
    check_rows,
    check_tied,
    check_weights,
    check_written,
    commit_of,
    config_in,
    config_source,
    explained,
    kind_of,
    locate,
    read_config,
    stored_dtype,
    tensor_files,
)
from recover.models.stored_weights import finite, from_files, shared_store, sources_of, store, store_of, stored_in
from recover.models.stores import Store
from recover.models.tokenizers import TRIAL, check_file, check_template
from recover.models.wrapper import beside, opened, remember, text_config, text_values, wrapped_of, wrapper_of

LISTED = 3  # tensors or tokens named in a message
SAID_BYTES = 2 * 2**30  # of weights: they take long enough to read that silence would look like a fault
# transformers fills missing tensors with random numbers and leaves unknown ones out, with a warning only.
MISFITS = {"missing_keys": "are missing from the weights", "unexpected_keys": "belong to no part of it"}


# What transformers unpacks on any machine, exactly: numbers of few bits, times the scale of their block.
UNPACKED: dict[str, Any] = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
# quant_method of a checkpoint -> the package that reads it (a GGUF file is converted, and needs none of them)
PACKAGES = {"awq": "gptqmodel", "gptq": "gptqmodel", "bitsandbytes": "bitsandbytes", "torchao": "torchao"}


@dataclasses.dataclass(frozen=True)
class Description(Shape):
    """What a model is, from its config alone; `bytes` is for the recipe's dtype, `stored` the checkpoint's own.

    `parallel`: only the sublayers of one block can be stored as a block. `block_parameters`: of each block, in its
    order. `beside`: parameters of a wrapper's other parts, which are in its files and not in `parameters`. `lone`: of
    blocks that are one sublayer each, which. `in_files`: each tensor lies in the files as it is, which
    `model.offload: disk` needs."""

    model_type: str
    context: int | None
    tied: bool
    embedding_parameters: int
    bytes: int
    stored: Dtype = "float32"
    parallel: bool = False
    beside: int = 0
    block_parameters: tuple[int, ...] = ()
    lone: tuple[Sublayer, ...] = ()
    in_files: bool = True


def describe(cfg: recipe.Model) -> Description:
    """Sizes of the model without loading a weight (a GGUF file is converted first). Raises ModelError."""
    config = checked_config(cfg)
    with torch.device("meta"), explained(cfg.source):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=cfg.trust_remote_code, attn_implementation="eager"
        )
    embeddings = {id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Description(
        model_type=config.model_type,
        blocks=config.num_hidden_layers,
        width=config.hidden_size,
        intermediate=neurons_of(config),
        heads=config.num_attention_heads,
        kv_heads=kv_heads_of(config),
        head_size=head_size_of(config),
        vocabulary=config.vocab_size,
        mlp_matrices=arch_of(config).mlp_matrices,
        context=getattr(config, "max_position_embeddings", None),
        tied=bool(config.tie_word_embeddings),
        parameters=parameters,
        embedding_parameters=sum(embeddings.values()),
        bytes=parameters * getattr(torch, cfg.dtype).itemsize,
        stored=stored_dtype(cfg),
        parallel=arch_of(config).together(config),
        attending=len(attending(model)),
        beside=parameters_beside(cfg),
        block_parameters=tuple(sum(each.numel() for each in block.parameters()) for block in blocks_of(model)),
        lone=lone_of(model),
        in_files=_in_files(cfg, model),
        lone_mlps=lone_of(model).count("mlp") if arch_of(config).lone else None,
        mixture=_mixture(model),
    )


def _in_files(cfg: recipe.Model, model: PreTrainedModel) -> bool:
    """Of a model on the hub its config says it, since files are not here yet; no files at all are refused elsewhere."""
    raw = read_config(cfg)
    if _method(raw) in UNPACKED:
        return False
    if wrapper_of(raw) is not None:
        return True
    if kind_of(cfg.source) == "hub":
        return arch_of(model).experts is None
    try:
        return sources_of(model, tensor_files(locate(cfg))) is not None
    except ModelError:
        return True


def _mixture(model: PreTrainedModel) -> Mixture | None:
    """What the model's mixtures of experts are, counted on one of them; None without any."""
    arch, blocks = arch_of(model), blocks_of(model)
    mixed = [block.get_submodule(arch.mlp) for block in blocks if mixture_in(arch, block)]
    if arch.experts is None or not mixed:
        return None
    experts, used = experts_of(model.config)
    groups, used_groups = groups_of(model.config)
    routed = sum(each.numel() for each in mixed[0].get_submodule(arch.experts.experts).parameters())
    shared: Any = mixed[0].get_submodule(arch.experts.shared) if arch.experts.shared else None
    return Mixture(
        experts=experts,
        used=used,
        intermediate=getattr(model.config, arch.experts.width),
        expert=routed // experts,
        always=sum(each.numel() for each in mixed[0].parameters()) - routed,
        shared=0 if shared is None else shared.get_submodule(arch.mlp_linears[-1]).in_features,
        plain=len(blocks) - len(mixed),
        row=sum(each[0].numel() for each in mixed[0].get_submodule(arch.experts.router).parameters()),
        groups=groups,
        used_groups=used_groups,
    )


def parameters_beside(cfg: recipe.Model) -> int:
    """Of a wrapper's other parts, which are copied and not loaded; 0 for a text model. Raises ModelError."""
    raw = read_config(cfg)
    if wrapper_of(raw) is None:
        return 0
    with explained(cfg.source):
        return beside(_stock_config(cfg, raw, config_source(cfg)))


def load_model(cfg: recipe.Model, *, shared: bool = False) -> PreTrainedModel:
    """The dense model in eval mode and the recipe's dtype, every tensor read from a checked file and finite.

    `shared`: the processes of a machine hold the blocks' matrices once together, each reading its share, where they can
    (all must call it together); `model.offload` and `model.load_in` go before.
    Raises ModelError naming the file: missing, corrupt or unsafe files, pickle weights, an unsupported type, tensors
    that are missing, left over or not finite.
    """
    config = checked_config(cfg)
    folder = locate(cfg)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if size > SAID_BYTES:
        console.say(f"[dim]reading {cfg.source}, {console.size(size)}[/dim]")
    attention = attention_for(cfg, config)
    place = _place(cfg, shared)
    if place is not None:
        return _stored(cfg, folder, attention, place)
    with explained(str(folder)):
        model = read_whole(cfg, folder, attn_implementation=attention)
    _check_finite(folder, model)
    return model


def _place(cfg: recipe.Model, shared: bool) -> Store | None:
    """Where the blocks' matrices go; None: with the model. Raises ModelError."""
    if cfg.offload != "none" or cfg.load_in is not None:
        _refuse_store(cfg)
        return store_of(cfg.offload, cfg.load_in, dist.device())
    return shared_store(dist.device()) if shared and not dist.alone() and dist.zero_stage() == 0 else None


def _stored(cfg: recipe.Model, folder: Path, attention: str, place: Store) -> PreTrainedModel:
    """The model with its blocks' matrices in the store, all else on this process's device."""
    made = None
    with explained(str(folder)):
        if _method(config_in(folder)) not in UNPACKED:
            meta = read_whole(cfg, folder, device_map={"": "meta"}, attn_implementation=attention)
            made = from_files(meta, folder, tensor_files(folder), place)
        if made is None:
            made = _read_first(cfg, folder, attention, place)
    by_rows(made)
    return made.eval()


def _read_first(cfg: recipe.Model, folder: Path, attention: str, place: Store) -> PreTrainedModel:
    """As `_stored`, for a model whose tensors are not in its files one by one: read whole, then put away."""
    if cfg.offload == "disk":
        raise not_in_files(str(folder))
    console.say(
        "[dim]its tensors are made of several in its files, or unpacked: it is read whole into main memory first[/dim]"
    )
    model = read_whole(cfg, folder, attn_implementation=attention)
    _check_finite(folder, model)
    model.requires_grad_(False)
    store(model, place)
    torch.nn.Module.to(model, place.device)
    return model


def not_in_files(source: str) -> ModelError:
    """What is said of a model whose tensors do not lie in its files as they are (`Description.in_files`)."""
    return ModelError(
        f"{source}: its tensors are made of several in its files when they are read, or unpacked, so they cannot "
        "stay there; use model.offload: cpu"
    )


def _refuse_store(cfg: recipe.Model) -> None:
    field = "model.load_in" if cfg.load_in is not None else "model.offload"
    if dist.zero_stage() > 0:
        raise ModelError(
            f"{field}: DeepSpeed, which was launched, deals out or copies all weights itself; launch with "
            "launch/gpu.yaml, or leave the field out"
        )


def read_whole(
    cfg: recipe.Model, folder: Path, *, refused: Collection[str] = tuple(MISFITS), **options: Any
) -> PreTrainedModel:
    """The folder's model in eval mode, from checked files, by `from_pretrained` with these options.

    Raises ModelError: files are missing, corrupt or unsafe, or config and weights misfit in one of the `refused` ways;
    ArtifactError: an export of ours that is not what was written.
    """
    check_written(folder)
    check_weights(folder)
    raw = config_in(folder)
    if "unexpected_keys" in refused and (rows := text_values(raw).get("vocab_size")):  # a quantizer packs rows
        check_rows(folder, rows)
    with unchanged(folder), explained(str(folder)):
        model, info = _from_folder(cfg, folder, **options)
        model.generation_config = keep_known(model.generation_config)
    check_tied(folder, bool(model.config.tie_word_embeddings))
    if "unexpected_keys" in refused:  # not of a quantizer
        floating: list[str] = [name for name, weight in model.named_parameters() if weight.is_floating_point()]
        floating += [name.removeprefix(f"{model.base_model_prefix}.") for name in floating]  # files of the body alone
        wrapped = wrapped_of(model)
        check_numbers(folder, floating if wrapped is None else [wrapped.text.get(name, name) for name in floating])
    _refuse_misfits(folder, info, refused)
    as_linears(model)
    by_rows(model)
    return model.eval()


def check_account(cfg: recipe.Model) -> None:
    """Hold the tensors of a local folder against its config by name and size, from their headers alone.

    As transformers would load them, renamed ones among them. Raises ModelError as `read_whole` does for those that are
    missing, left over, or of another size.
    """
    folder = locate(cfg)
    if is_deepspeed_zero3_enabled():  # there a model is made in shares, and `read_whole` looks at them
        return
    with explained(str(folder)):
        _, info = _from_folder(cfg, folder, device_map={"": "meta"})
    _refuse_misfits(folder, info, MISFITS)


def _from_folder(cfg: recipe.Model, folder: Path, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """What `from_pretrained` gives with these options, and what it says of the tensors instead of printing that."""
    raw = config_in(folder)
    config, wrapped = _stock_config(cfg, raw, folder), None
    kind: Any = AutoModelForCausalLM
    place: Path | None = folder
    with ExitStack() as stack:
        if wrapper_of(raw) is not None:
            wrapped = opened(tensor_files(folder), config, folder)
            config, place = wrapped.dense, None
            kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            options["state_dict"] = stack.enter_context(wrapped.slices())
        if (method := _method(raw)) in UNPACKED:
            console.say(f"[dim]{cfg.source}: stored as {method}, and unpacked to {cfg.dtype}[/dim]")
            options["quantization_config"] = UNPACKED[method](dequantize=True)
        stack.enter_context(console.silent("transformers"))
        loaded: Any = kind.from_pretrained(
            place,
            config=config,
            dtype=getattr(torch, cfg.dtype),
            trust_remote_code=cfg.trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused by name
            **options,
        )
    model, info = loaded
    if wrapped is not None and (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    remember(model, wrapped)
    return model, info


def _refuse_misfits(folder: Path, info: dict[str, Any], refused: Collection[str]) -> None:
    if unlike := sorted(info["mismatched_keys"]):
        name, stored, expected = unlike[0]
        raise ModelError(
            f"{folder}: config.json and weights do not belong together: {name} is {list(stored)} in the weights, "
            f"{list(expected)} by config.json ({len(unlike)} such tensors)"
        )
    for misfit in refused:
        names = sorted(info[misfit])
        if names:
            raise ModelError(
                f"{folder}: config.json and weights do not belong together: {len(names)} tensors {MISFITS[misfit]}, "
                f"such as {', '.join(names[:LISTED])}"
            )


def ready(model: PreTrainedModel) -> PreTrainedModel:
    """The model on this process's device, in evaluation mode; one whose weights are in a store is there already."""
    if stored_in(model) is None:
        torch.nn.Module.to(model, dist.device())
    return model.eval()


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


def load_tokenizer(cfg: recipe.Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer, which has an end-of-sequence token and a padding token.

    Raises ModelError: it cannot be loaded, lacks one of these, or its chat template is broken or has no end.
    """
    folder = locate(cfg, cfg.tokenizer)
    tokenizers.check_there(folder)
    tokenizers.check_parts(folder)
    check_file(folder)
    with unchanged(folder), explained(f"{folder}: tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=cfg.trust_remote_code, local_files_only=True
        )
        for special in (True, False):  # that it loads does not mean that it works
            tokenizer.decode(tokenizer(TRIAL, add_special_tokens=special, verbose=False)["input_ids"])
        tokenizers.check_time(tokenizer, folder)
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ModelError(
            f"{folder}: holds no tokenizer (tokenizer.json or tokenizer.model): copy it there, or set model.tokenizer"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{folder}: the tokenizer has no end-of-sequence token, so generation would never end; "
            "set 'eos_token' in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    check_template(tokenizer, folder)
    return tokenizer


def check_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """As `tokenizers.fit`, for the embedding of this model (more rows than words are fine). Raises ModelError."""
    tokenizers.fit(tokenizer, model.config.get_text_config(decoder=True).vocab_size)


def check_tokenizers(
    dense: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, source: str = "the other model"
) -> None:
    """Every id means one token in both (either may have tokens added at the end), or raise ModelError."""
    first, second = ({number: token for token, number in each.get_vocab().items()} for each in (dense, other))
    differing = [number for number in sorted(first.keys() & second.keys()) if first[number] != second[number]]
    if differing:
        shown = ", ".join(f"{number} is {first[number]!r} and {second[number]!r}" for number in differing[:LISTED])
        raise ModelError(
            f"{source}: another tokenizer than the dense model's: {len(differing)} ids are different tokens ({shown}); "
            "expected two checkpoints of one tokenizer"
        )


def checked_config(cfg: recipe.Model) -> PretrainedConfig:
    """The config of a supported type, which is checked before transformers sees it and before weights are fetched."""
    raw = read_config(cfg)
    if wrapper_of(raw) is None:
        arch_of_config(raw)
    if (method := _method(raw)) is not None and method not in UNPACKED:
        raise ModelError(
            f"{cfg.source}: quantized with '{method}', and quantized weights are neither pruned nor trained here: give "
            "the checkpoint it was made from (`recover measure` and `recover diagnose` take it as it is; weights in "
            f"{' and '.join(UNPACKED)} are unpacked when they are read)"
        )
    config = _stock_config(cfg, raw, config_source(cfg))
    if wrapper_of(raw) is not None:
        with explained(cfg.source):
            config = text_config(config)
        arch_of_config(config.to_dict())
    return config


def _method(raw: Mapping[str, Any]) -> str | None:
    """How the weights are quantized, None if they are not."""
    quantized = raw.get("quantization_config")
    return str(quantized.get("quant_method")) if quantized else None


def _stock_config(cfg: recipe.Model, raw: JsonObject, source: str | Path) -> PretrainedConfig:
    """The config of checked settings; with code of others let run, as that code makes it."""
    with explained(str(source)):
        if cfg.trust_remote_code:
            revision = None if Path(source).is_dir() else commit_of(cfg, str(source))
            return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=True)
        return _with_true_sizes(config_of(raw, str(source), Path(source) / CONFIG))


def _with_true_sizes(config: Any) -> Any:
    """The config, with the neurons that an MLP has; LFM2's names others, of which the class computes them."""
    if getattr(config, "block_auto_adjust_ff_dim", False):
        neurons = int(2 * config.intermediate_size / 3)
        if config.block_ffn_dim_multiplier is not None:
            neurons = int(config.block_ffn_dim_multiplier * neurons)
            neurons = -(-neurons // config.block_multiple_of) * config.block_multiple_of
        config.intermediate_size, config.block_auto_adjust_ff_dim = neurons, False
    return config


def attention_for(cfg: recipe.Model, config: PretrainedConfig) -> str:
    """The attention to load the model with: the recipe's, or what its class has, with a warning."""
    stock: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if cfg.attention == "sdpa" and not stock._supports_sdpa:
        console.warn(f"model.attention: {stock.__name__} has no 'sdpa'; 'eager' is used")
        return "eager"
    return cfg.attention


def _check_finite(folder: Path, model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        finite(folder, name, parameter)
