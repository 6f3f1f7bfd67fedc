"""A folder that any stock tool loads: weights, config, tokenizer, card, provenance, hashes; whole, or not there."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from huggingface_hub import save_torch_state_dict

from recover.base import artifacts, console
from recover.base.errors import ExportError
from recover.export.spelling import respell_config, write_tokenizer
from recover.models.arch import arch_of
from recover.models.wrapper import Wrapped, wrapped_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CARD = "README.md"
RECORD = "recover.json"
# What turns images and sound into a wrapper's inputs.
PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def write_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    card: str,
    record: Mapping[str, Any],
    max_shard_size: str = "5GB",
) -> Path:
    """Publish `model` (a stock model, from `merge`) under `folder` in one rename, replacing what we wrote there.

    A `folder` that is a link stays one: what it points to is replaced. Files of others are kept (`artifacts.publish`).

    Raises ExportError for a model whose class stock transformers does not have, and for one without an end-of-text
    token (it would never stop); ArtifactError, with path and bytes, when the disk is full.
    """
    _refuse_custom_class(model)
    model.generation_config = _generation_config(model, tokenizer)
    target = folder.resolve()  # a rename has to stay on one disk
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with artifacts.explaining_libraries(folder, size), artifacts.scratch(target) as beside:
        config = model.config
        if (wrapped := wrapped_of(model)) is None:
            model.save_pretrained(beside, max_shard_size=max_shard_size)
        else:
            config = _write_wrapped(model, wrapped, beside, max_shard_size)
        respell_config(beside, config)
        write_tokenizer(tokenizer, beside)
        artifacts.write_text(beside / CARD, card if wrapped is None else _of_wrapper(card))
        artifacts.write_json(beside / RECORD, record)
        artifacts.publish(beside, target, keep_edited=True)
    return folder


def _of_wrapper(card: str) -> str:
    """The card of a text model, for the wrapper that it is in."""
    card = card.replace("AutoModelForCausalLM.from_pretrained", "AutoModelForImageTextToText.from_pretrained")
    return card.replace("pipeline_tag: text-generation", "pipeline_tag: image-text-to-text")


def _write_wrapped(model: PreTrainedModel, wrapped: Wrapped, folder: Path, max_shard_size: str) -> PretrainedConfig:
    """Write the wrapper around this text model, and give its config.

    Tensors have the names that they had in the dense folder, those of other parts their very bits: they are read a
    shard at a time.
    """
    blocks = arch_of(model).blocks
    tied = set(model.all_tied_weights_keys)  # pyright: ignore[reportArgumentType]
    text = {wrapped.source_name(name, blocks): value for name, value in model.state_dict().items() if name not in tied}
    tensors = text | {source: wrapped.tensor(source) for source in wrapped.others}
    save_torch_state_dict(tensors, folder, max_shard_size=max_shard_size)
    config = wrapped.config_around(model.config)
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)  # pyright: ignore[reportOptionalMemberAccess]
    for name in PROCESSORS:
        if (source := wrapped.folder / name).is_file():
            shutil.copyfile(source, folder / name)
    return config


def _refuse_custom_class(model: PreTrainedModel) -> None:
    cls = type(model)
    if getattr(transformers, cls.__name__, None) is not cls:
        raise ExportError(
            f"{cls.__module__}.{cls.__name__}: not a class of stock transformers; expected what merge() gives"
        )


def _generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The dense model's generation config, completed (EOS, PAD, cache on) and such that `save_pretrained` takes it."""
    generation: Any = copy.deepcopy(model.generation_config)
    if generation.eos_token_id is None:
        generation.eos_token_id = model.config.eos_token_id
    if generation.eos_token_id is None:
        generation.eos_token_id = tokenizer.eos_token_id
    if generation.eos_token_id is None:
        raise ExportError("neither the model nor its tokenizer has an end-of-text token: set the tokenizer's eos_token")
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        generation.eos_token_id = [*ends, tokenizer.eos_token_id]  # texts that were learnt end in it
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    generation.use_cache = True
    try:
        generation.validate(strict=True)
    except ValueError as error:
        # Some published configs hold a temperature beside do_sample: false, which transformers loads but does not save.
        console.warn(f"export: generation_config holds sampling options, so do_sample becomes true ({error})")
        generation.do_sample = True
    return generation
