"""A text model inside a wrapper, beside parts that read images or sound: opened for the stages, and closed at export.

The stages see the causal LM of the text tower alone. Of the other parts nothing is loaded: each of their tensors is
accounted for by name and shape when the folder is opened, and copied from file to file when the same wrapper is written
again around the pruned text model.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from recover.base import console
from recover.base.artifacts import JsonObject
from recover.base.errors import ModelError
from recover.models.settings import allowed_of

TEXT = "text_config"
# What belongs to the numbers of few bits in a weight, under its name.
SCALES = re.compile(r"(.*\.weight)(_scale_inv|_scale)|(.*\.)(activation_scale|input_scale)")
LISTED = 3  # tensors named in a message
OF_IMAGES = ("mrope_section", "mrope_interleaved")  # rotary settings that say nothing where all tokens are text


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """Where the text model is in one type of wrapper, as module names from the wrapper's class down.

    `texts`: types of text models that published checkpoints have. `text_as`: the model type whose causal LM computes
    the same on text, where the tower has no causal LM of its own. `beside`: tensors of published checkpoints that no
    class of transformers reads; they are copied too.
    """

    model_type: str
    texts: tuple[str, ...]
    tower: str = "model.language_model"
    head: str = "lm_head"
    text_as: str = ""
    beside: str = ""


WRAPPERS: dict[str, Wrapper] = {
    wrapper.model_type: wrapper
    for wrapper in (
        Wrapper("gemma3", ("gemma3_text",)),
        Wrapper("mistral3", ("mistral", "ministral3")),
        Wrapper("llava", ("llama", "mistral", "qwen2")),
        Wrapper("qwen2_vl", ("qwen2",), text_as="qwen2"),
        Wrapper("qwen2_5_vl", ("qwen2",), text_as="qwen2"),
        Wrapper("qwen3_vl", ("qwen3",), text_as="qwen3"),
        Wrapper("gemma4", ("gemma4_text",)),
        Wrapper("gemma4_unified", ("gemma4_unified_text",)),
        Wrapper("qwen3_5", ("qwen3_5_text",), beside=r"mtp\."),
    )
}


def wrapper_of(config: Mapping[str, Any]) -> Wrapper | None:
    """The row of this raw config; None for a text model."""
    return WRAPPERS.get(str(config.get("model_type")))


def text_values(config: JsonObject) -> JsonObject:
    """The settings of the text model in a raw config; older files of some wrappers have them beside the others."""
    inner = config.get(TEXT)
    return inner if wrapper_of(config) is not None and isinstance(inner, dict) else config


def text_config(config: Any) -> Any:
    """The config of the causal LM of a wrapper's text tower; head and embedding are one where the wrapper's are."""
    wrapper = WRAPPERS[config.model_type]
    inner = config.get_text_config(decoder=True)
    values = inner.to_dict()
    if wrapper.text_as:
        values = {key: value for key, value in values.items() if key in allowed_of(wrapper.text_as)}
        rope = values.get("rope_parameters") or {}
        values["rope_parameters"] = {key: value for key, value in rope.items() if key not in OF_IMAGES}
        values["model_type"] = wrapper.text_as
    if quantized := config_of_quantization(config):
        values["quantization_config"] = quantized
    values["tie_word_embeddings"] = bool(config.tie_word_embeddings)
    kind: Any = CONFIG_MAPPING[wrapper.text_as] if wrapper.text_as else type(inner)
    made = kind.from_dict(values)
    made.name_or_path = config.name_or_path
    return made


@dataclasses.dataclass(frozen=True)
class Wrapped:
    """What a text model was taken out of: the wrapper's config, and where each tensor lies in its folder.

    `text`: for each tensor of the causal LM its name in the files, `scales`: those that belong to numbers of few bits
    in it. `others`: names in the files of all else.
    `dense`: the config of the causal LM as it was.
    """

    wrapper: Wrapper
    folder: Path
    config: Any
    dense: Any
    files: dict[str, Path]
    text: dict[str, str]
    others: tuple[str, ...]
    scales: dict[str, str]

    @contextmanager
    def slices(self) -> Iterator[dict[str, Any]]:
        """Tensors of the causal LM by name, read when they are taken, for `from_pretrained(state_dict=)`."""
        with ExitStack() as stack:
            opened = {path: stack.enter_context(safe_open(path, "pt")) for path in set(self.files.values())}
            names = {**self.text, **self.scales}
            yield {name: opened[self.files[source]].get_slice(source) for name, source in names.items()}

    def tensor(self, source: str) -> Tensor:
        """A tensor of the folder, by its name in the files, as it is stored."""
        with safe_open(self.files[source], "pt") as file:
            return file.get_tensor(source)

    def source_name(self, name: str, blocks: str) -> str:
        """What a tensor of an exported causal LM is called in the files. `blocks`: the path of its list of blocks.

        Blocks may be of several kinds, so that a tensor is looked for in any block, and numbered anew.
        """
        match = re.fullmatch(re.escape(blocks) + r"\.(\d+)\.(.*)", name)
        if match is None:
            return self.text[name]
        of_block = re.compile(re.escape(blocks) + r"\.(\d+)\." + re.escape(match[2]))
        matches = ((of_block.fullmatch(known), source) for known, source in self.text.items())
        number, source = next((found[1], source) for found, source in matches if found)
        before, _, behind = source.partition(f".{number}.{match[2].partition('.')[0]}")
        return f"{before}.{match[1]}.{match[2].partition('.')[0]}{behind}"

    def config_around(self, pruned: Any) -> Any:
        """The wrapper's config with the text model's changed settings: those in which `pruned` differs from dense."""
        config = type(self.config).from_dict(self.config.to_dict())
        inner = config.get_text_config(decoder=True)
        before = self.dense.to_dict()
        for key, value in pruned.to_dict().items():
            if key not in before or before[key] != value:
                setattr(inner, key, value)
        config.dtype = inner.dtype = pruned.dtype
        if config_of_quantization(config):
            del config.quantization_config  # what it says is unpacked
        stock: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
        config.architectures = [stock.__name__]
        return config


def config_of_quantization(config: Any) -> Any:
    """What a config says of weights of few bits, None where they are none."""
    return getattr(config, "quantization_config", None)


def beside(config: Any) -> int:
    """Parameters of all parts but the text model."""
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(config)
    wrapper = WRAPPERS[config.model_type]
    return sum(value.numel() for name, value in whole.named_parameters() if not _is_text(wrapper, name))


def wrapped_of(model: Any) -> Wrapped | None:
    """What this text model was taken out of, None if it is a model of its own."""
    return getattr(model, "recover_wrapped", None)


def remember(model: Any, wrapped: Wrapped | None) -> None:
    """Let `wrapped_of` know it."""
    model.recover_wrapped = wrapped


def opened(files: Mapping[str, Path], config: Any, folder: Path) -> Wrapped:
    """Where the text model lies in a folder of `files` (tensor name: file); no weight is read.

    Raises ModelError for tensors that are missing, belong to no part of the wrapper, or have another shape than it.
    """
    wrapper = WRAPPERS[config.model_type]
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(config)
    meta = whole.state_dict()
    mapping = get_model_conversion_mapping(whole)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    found: dict[str, list[str]] = {}
    converted, strange, beside = set(), [], []
    scales: dict[str, str] = {}  # of the text model's weights
    for source in files:
        if (scale := SCALES.fullmatch(source)) and config_of_quantization(config):
            weight = scale[1] or f"{scale[3]}weight"
            name, _ = rename_source_key(weight, renamings, converters, whole.base_model_prefix, meta)
            if name not in meta or not _is_text(wrapper, name):
                strange.append(source)
            else:
                scales[_in_text(wrapper, name).removesuffix("weight") + source.rpartition(".")[2]] = source
            continue
        name, by = rename_source_key(source, renamings, converters, whole.base_model_prefix, meta)
        if name not in meta and source in meta:
            name, by = source, None
        converted |= {name} if by is not None else set()
        if name in meta:
            found.setdefault(name, []).append(source)
        elif wrapper.beside and re.match(wrapper.beside, source):
            beside.append(source)
        else:
            strange.append(source)
    if beside:
        console.say(
            f"[dim]{folder.name}: {beside[0]} and {len(beside) - 1} more: read by no class of transformers; an export "
            "has them as they are, made for the dense model[/dim]"
        )
    tied = set(whole.all_tied_weights_keys)  # those that are another one under a second name
    missing = sorted(meta.keys() - found.keys() - tied)
    for names, what in ((missing, "are missing from the weights"), (strange, "belong to no part of it")):
        if names:
            raise ModelError(
                f"{folder}: config.json and weights do not belong together: {len(names)} tensors {what}, such as "
                f"{', '.join(names[:LISTED])}"
            )
    plain = {name: sources[0] for name, sources in found.items() if name not in converted}
    _check_shapes(folder, files, plain, meta)
    text = {_in_text(wrapper, name): source for name, source in plain.items() if _is_text(wrapper, name)}
    others = tuple(sorted(files.keys() - set(text.values()) - set(scales.values())))
    return Wrapped(wrapper, folder, config, text_config(config), dict(files), text, others, scales)


def _is_text(wrapper: Wrapper, name: str) -> bool:
    return name.startswith((f"{wrapper.tower}.", f"{wrapper.head}."))


def _in_text(wrapper: Wrapper, name: str) -> str:
    """The name in the causal LM of a tensor of the wrapper."""
    return f"model.{name.removeprefix(f'{wrapper.tower}.')}" if name.startswith(f"{wrapper.tower}.") else name


def _check_shapes(
    folder: Path, files: Mapping[str, Path], names: Mapping[str, str], meta: Mapping[str, Tensor]
) -> None:
    """Of the parts that are not loaded: the text model's are compared when they are."""
    by_file: dict[Path, list[str]] = {}
    for name, source in names.items():
        by_file.setdefault(files[source], []).append(name)
    for path, inside in by_file.items():
        with safe_open(path, "pt") as file:
            for name in inside:
                shape = tuple(file.get_slice(names[name]).get_shape())
                if shape != tuple(meta[name].shape):
                    raise ModelError(
                        f"{folder}: config.json and weights do not belong together: {names[name]} is {list(shape)} in "
                        f"the weights, {list(meta[name].shape)} by config.json"
                    )
