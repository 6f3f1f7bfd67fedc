"""A folder that any stock tool loads: weights, config, tokenizer, card, provenance, hashes; whole, or not there.

Its settings files are spelt so that transformers 4 reads them too, and with it vLLM, SGLang, MLX and llama.cpp's
converter. transformers 5 saves rotary positions as `rope_parameters`, which version 4 leaves unread: it computes with
base 10000 and no scaling, and says nothing. Of a tokenizer it saves a class name and a list of tokens that version 4
cannot load. The model card (`card`) says what the model is, what it kept of dense, how it was made.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import transformers
import yaml
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from transformers import AutoTokenizer
from transformers.core_model_loading import revert_weight_conversion

from recover.base import artifacts, console
from recover.base.artifacts import JsonObject
from recover.base.errors import ExportError, RecipeError
from recover.config import yaml_values
from recover.config.recipe import Model, Recipe, without_folders
from recover.config.tasks import USES, Figure, headline_figures
from recover.export.merge import merge, one_by_one
from recover.models.arch import arch_of
from recover.models.load import load_model, ready
from recover.models.plan import PlanRecord
from recover.models.site import SUBLAYERS, Site, packed_as, zeroed_partners
from recover.models.source import INDEX, WEIGHTS, kind_of
from recover.models.stored_weights import stored_in
from recover.models.wrapper import Wrapped, wrapped_of
from recover.report import words
from recover.report.data import Plan

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from recover.models.twin import Twin

CARD = "README.md"
RECORD = "recover.json"
# What turns images and sound into a wrapper's inputs.
PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def write_merged(
    twin: Twin, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase, folder: Path, **options: Any
) -> PreTrainedModel:
    """Merge, and `write_checkpoint` with these `options`; the merged model, on this process's device.

    Of a twin whose weights come and go, one tensor after the other is merged and written, and the model is read back
    from its files, where it stays. Raises as `merge` and `write_checkpoint` do.
    """
    if stored_in(twin.base) is None:
        merged = ready(merge(twin, dtype))
        write_checkpoint(merged, tokenizer, folder, **options)
        return merged
    stock, tensors = one_by_one(twin, dtype)
    write_checkpoint(stock, tokenizer, folder, tensors=tensors, **options)
    whole = twin.arch.experts is not None  # those of a block are one tensor in memory, and several in files
    there = {"dtype": str(dtype).removeprefix("torch."), "attention": twin.base.config._attn_implementation}
    return load_model(Model.model_validate({"source": str(folder), "offload": "cpu" if whole else "disk", **there}))


def write_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    card: str,
    record: Mapping[str, Any],
    max_shard_size: str = "5GB",
    tensors: Iterable[tuple[str, Tensor]] | None = None,
) -> Path:
    """Publish `model` (a stock model, from `merge`) under `folder` in one rename, replacing what we wrote there.

    `tensors`: its tensors one after the other, where the model itself holds none (`merge.unfilled`): at most a file of
    them is in memory at a time.
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
        if (wrapped := wrapped_of(model)) is not None:
            config = _write_wrapped(model, wrapped, beside, max_shard_size, tensors)
        elif tensors is None:
            model.save_pretrained(beside, max_shard_size=max_shard_size)
        else:
            model.save_pretrained(beside, state_dict={})  # settings alone
            _write_one_by_one(_as_stored(model, tensors), beside, max_shard_size)
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


def _as_stored(model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors under the names that they have in files, without those that are another one under a second name."""
    tied = set(model.all_tied_weights_keys)  # pyright: ignore[reportArgumentType]
    block = re.compile(r".*?\.\d+\.")
    kept = ((name, value) for name, value in tensors if name not in tied)
    # What a file has as one tensor, or several, is of one block.
    for _, group in groupby(kept, key=lambda pair: match[0] if (match := block.match(pair[0])) else pair[0]):
        yield from revert_weight_conversion(model, dict(group)).items()


def _bytes_of(size: str) -> int:
    """Of `5GB`, as `huggingface_hub` has it."""
    return int(size[:-2]) * 1000 ** ("KMGT".index(size[-2]) + 1)


def _write_one_by_one(tensors: Iterable[tuple[str, Tensor]], folder: Path, max_shard_size: str) -> None:
    """Weights as any library reads them: one file, or files of at most this size with an index beside them."""
    limit, size, total = _bytes_of(max_shard_size), 0, 0
    files: list[tuple[Path, list[str]]] = []
    held: dict[str, Tensor] = {}

    def write() -> None:
        path = folder / f"{len(files)}.part"
        save_file({name: value.contiguous() for name, value in held.items()}, path, {"format": "pt"})
        files.append((path, list(held)))
        held.clear()

    for name, value in tensors:
        if held and size + value.nbytes > limit:
            write()
            size = 0
        held[name], size, total = value, size + value.nbytes, total + value.nbytes
    write()
    index: dict[str, str] = {}
    for number, (path, names) in enumerate(files, 1):
        name = WEIGHTS if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        path.rename(folder / name)
        index |= dict.fromkeys(names, name)
    if len(files) > 1:
        artifacts.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def _write_wrapped(
    model: PreTrainedModel,
    wrapped: Wrapped,
    folder: Path,
    max_shard_size: str,
    tensors: Iterable[tuple[str, Tensor]] | None,
) -> PretrainedConfig:
    """Write the wrapper around this text model, and give its config.

    Tensors have the names that they had in the dense folder, those of other parts their very bits: they are read a
    shard at a time.
    """
    blocks = arch_of(model).blocks
    tied = set(model.all_tied_weights_keys)  # pyright: ignore[reportArgumentType]
    pairs = model.state_dict().items() if tensors is None else tensors
    text = ((wrapped.source_name(name, blocks), value) for name, value in pairs if name not in tied)
    others = ((source, wrapped.tensor(source)) for source in wrapped.others)
    if tensors is None:
        save_torch_state_dict({**dict(text), **dict(others)}, folder, max_shard_size=max_shard_size)
    else:
        _write_one_by_one(chain(text, others), folder, max_shard_size)
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


CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
# Everything that a tokenizer is read from, in any version.
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
    "*.model",
    "tekken.json",
)
TEMPLATES = "additional_chat_templates"
# Rotary types that version 4 has for a model only with these keys and no other, one of them by its older name.
OLD_KEYS = {"phi3": ("type", "short_factor", "long_factor"), "olmo2": ("type", "factor")}
# Kinds of blocks in version 4's words, which version 5 reads too.
OLD_LAYERS = {"granitemoehybrid": {"linear_attention": "mamba", "full_attention": "attention"}}
CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}  # names of version 5, in version 4's words
LEAKED = ("is_local", "local_files_only", "backend", "name_or_path")  # of how it was loaded where it was saved
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
SAMPLE = "Anna's 3 cats weigh 12.5 kg,\n\n  and 1024 mice\t(in all) flee — naïve café, 東京 🙂 <x> </s>."


def respell_config(folder: Path, config: PretrainedConfig) -> None:
    """Give the folder's config.json, as `save_pretrained` wrote it for this config, in both spellings.

    `auto_map` goes: it names files of code that an export does not hold, for a class that transformers has itself.
    """
    values: JsonObject = artifacts.read_json(folder / CONFIG)
    values.pop("auto_map", None)
    if values.get("dtype") is not None:
        values["torch_dtype"] = values["dtype"]
    if isinstance(inner := values.get("text_config"), dict):
        text = config.get_text_config(decoder=True)
        values["text_config"] = _renamed(text) | _both_ropes(inner, text)
    if (words := OLD_LAYERS.get(values["model_type"])) and values.get("layer_types"):
        values["layer_types"] = [words.get(kind, kind) for kind in values["layer_types"]]
    _write(folder / CONFIG, _renamed(config) | _both_ropes(values, config))


def _both_ropes(values: JsonObject, config: PretrainedConfig) -> JsonObject:
    """The settings of one model with its rotary positions in both spellings, if there are some with two."""
    if not isinstance(rope := values.get("rope_parameters"), dict):
        return values
    both = values | old_rope(values["model_type"], rope)
    old = {key: value for key, value in both.items() if key != "rope_parameters"}
    if _rope_of(config, both) == _rope_of(config, old) == _rope_of(config, values):
        return both
    console.warn(
        "export: these rotary positions have no form in the config of transformers 4, so readers that know "
        f"that form alone (older vLLM, MLX, llama.cpp's converter) compute others: {json.dumps(rope)[:200]}"
    )
    return values


def _renamed(config: PretrainedConfig) -> dict[str, Any]:
    """Settings that are saved under another name than the class declares, by the declared name, which version 4 reads.

    Qwen3-MoE's `num_experts`: without it version 4 and vLLM would take 128.
    """
    declared = {field.name for field in dataclasses.fields(type(config))} if dataclasses.is_dataclass(config) else set()
    return {name: getattr(config, name) for name in type(config).attribute_map if name in declared}


def old_rope(model_type: str, rope: JsonObject) -> JsonObject:
    """`rope_parameters` as version 4 has them: `rope_theta`, `rope_scaling`, and of Gemma 3 `rope_local_base_freq`."""
    found: JsonObject = {}
    if isinstance(full := rope.get("full_attention"), dict):
        rope, sliding = full, rope.get("sliding_attention") or {}
        if "rope_theta" in sliding:
            found["rope_local_base_freq"] = sliding["rope_theta"]
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    for key in ("rope_theta", "partial_rotary_factor"):
        if rope.get(key) is not None:
            found[key] = rope[key]
    if scaling.get("rope_type", "default") == "default":  # `mrope_section` and the like say how images are counted
        return {**found, "rope_scaling": scaling if scaling.keys() - {"rope_type"} else None}
    if scaling["rope_type"] == "longrope" and "original_max_position_embeddings" in scaling:
        found["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    if model_type in OLD_KEYS:
        scaling["type"] = scaling["rope_type"]
        scaling = {key: scaling[key] for key in OLD_KEYS[model_type] if key in scaling}
    return {**found, "rope_scaling": scaling}


def _rope_of(config: PretrainedConfig, values: JsonObject) -> Any:
    """What this transformers reads of these settings' rotary positions; None where it refuses them."""
    try:
        rope = type(config).from_dict(copy.deepcopy(values)).to_dict()["rope_parameters"]
    except Exception:  # of whatever kind: then they have to be spelled otherwise
        return None
    return {key: value for key, value in rope.items() if key != "type" and value is not None}


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer: the files that it was loaded from, where they give the same one; else as it is saved.

    Raises ExportError where neither reads back as the tokenizer.
    """
    tokenizer.save_pretrained(folder)
    if not type(tokenizer).__module__.startswith("transformers."):
        return  # its own code says how it is written
    saved = {path.name: path.read_bytes() for path in _files_of(folder)}
    old = _respelled(tokenizer, json.loads(saved[TOKENIZER]))
    source = Path(str(tokenizer.name_or_path))
    if (source / TOKENIZER).is_file():
        _clear(folder)
        for path in _files_of(source):
            shutil.copyfile(path, folder / path.name)
        own = _respelled(tokenizer, artifacts.read_json(source / TOKENIZER))
        if not (source / TEMPLATES).is_dir() and _reads_back(tokenizer, folder, own) is None:
            return
        _clear(folder)
        for name, data in saved.items():
            (folder / name).write_bytes(data)
    if problem := _reads_back(tokenizer, folder, old):
        raise ExportError(f"{folder}: the tokenizer that was written is not the one that was given: {problem}")


def _files_of(folder: Path) -> list[Path]:
    return sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)})


def _clear(folder: Path) -> None:
    for path in _files_of(folder):
        path.unlink()


def _respelled(tokenizer: PreTrainedTokenizerBase, values: JsonObject) -> JsonObject:
    """tokenizer_config.json in words that both versions have, with the special tokens that this tokenizer names."""
    values = {key: value for key, value in values.items() if key not in (*LEAKED, "auto_map")}
    kind = values.get("tokenizer_class")
    values["tokenizer_class"] = CLASSES.get(str(kind), kind)
    if isinstance(extra := values.get("extra_special_tokens"), list):  # version 4 has names there, and a list here
        del values["extra_special_tokens"]
        values["additional_special_tokens"] = extra
    for name in NAMED:
        token = getattr(tokenizer, name, None)
        stored = values.get(name)
        if token is not None and (stored["content"] if isinstance(stored, dict) else stored) != token:
            values[name] = token
    return values


def _reads_back(tokenizer: PreTrainedTokenizerBase, folder: Path, values: JsonObject) -> str | None:
    """Write tokenizer_config.json; None if the folder gives this tokenizer, else what differs.

    A class of transformers has tokens of its own (Qwen2's is `<|endoftext|>`) that it adds to a vocabulary without them
    where the file is silent: then the file says null.
    """
    silent = {name: None for name in NAMED if getattr(tokenizer, name, None) is None}
    return _differs(tokenizer, folder, values) and _differs(tokenizer, folder, values | silent)


def _differs(tokenizer: PreTrainedTokenizerBase, folder: Path, values: JsonObject) -> str | None:
    _write(folder / TOKENIZER, values)
    try:
        read: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a library raises: this spelling does not do
        return f"{type(error).__name__}: {error}"
    for what, of in CHECKS.items():
        if of(read) != of(tokenizer):
            return f"{what} differ"
    return None


def _write(path: Path, values: JsonObject) -> None:
    """As `save_pretrained` writes JSON: a number that is not finite (Gemma's window) stays what it is."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


CHECKS: dict[str, Callable[[Any], Any]] = {
    "vocabularies": lambda tokenizer: tokenizer.get_vocab(),
    "special tokens": lambda tokenizer: {name: getattr(tokenizer, f"{name}_id") for name in NAMED},
    "lists of special tokens": lambda tokenizer: set(tokenizer.all_special_ids),
    "chat templates": lambda tokenizer: tokenizer.chat_template,
    "tokens of a text": lambda tokenizer: tokenizer(SAMPLE)["input_ids"],
    "tokens of a bare text": lambda tokenizer: tokenizer(SAMPLE, add_special_tokens=False)["input_ids"],
}


HUB_ID = r"\w[\w.-]*/\w[\w.-]*"
SNAPSHOT = re.compile(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/")  # of a hub model in the cache
LONGEST = 2**16  # characters of a model card that are looked at
# Of its header what is taken over: names and an address, and no other text of theirs, in our card.
LICENCE = {
    "license": r"[\w.+-]{1,100}",
    "license_name": r"[\w .,()+-]{1,100}",
    "license_link": r"https?://[^\s<>\"'`()\[\]]{1,300}|[\w.-]{1,100}",
}
MASKED = (
    "Its zeros stay only while nobody writes them: a LoRA adapter that is trained on this model and merged with stock "
    "tools fills them (W + BA has none), and so does full fine-tuning. Apply the masks again after a merge."
)


def origin(cfg: Model) -> dict[str, str]:
    """What the header of a card says of the dense model: `base_model` where it has an id on a hub, and its licence.

    From its id, or from what its folder says of itself: the card's header, the config. A hub that cannot be reached
    leaves the licence unknown.
    """
    if cfg.source.startswith("embedded:"):
        return {"license": "apache-2.0"}
    kind = kind_of(cfg.source)
    said = _said(_card_of(cfg, kind))
    found = {key: said[key] for key, form in LICENCE.items() if key in said and re.fullmatch(form, said[key])}
    base = cfg.source if kind == "hub" else _id_of(Path(cfg.source), said)
    return ({"base_model": base} if base else {}) | ({"license": "unknown"} | found)


def _id_of(folder: Path, said: dict[str, str]) -> str | None:
    """The hub id of a model on disk, or of what it was made from, if its files tell."""
    if cached := SNAPSHOT.search(f"{folder.absolute()}/"):
        return f"{cached[1]}/{cached[2]}"
    config = artifacts.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    names = (config.get("_name_or_path"), said.get("base_model"))
    ids = [name for name in names if isinstance(name, str) and re.fullmatch(HUB_ID, name)]
    return next((name for name in ids if not Path(name).exists()), None)


def _card_of(cfg: Model, kind: str) -> str:
    """The dense model's own card, empty where there is none to be had."""
    if kind == "hub":
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(cfg.source, CARD, revision=cfg.revision))
        except Exception:  # no card, no network, no rights: the licence is then unknown
            return ""
    else:
        path = Path(cfg.source).expanduser() / CARD
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(LONGEST)


def _said(text: str) -> dict[str, str]:
    """What the header of a card says in words: lists are taken by their first entry."""
    header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        values = yaml_values.load(header[1], CARD) if header else {}
    except RecipeError:
        values = {}
    pairs = values.items() if isinstance(values, dict) else ()
    first = {str(key): value[0] if isinstance(value, list) and value else value for key, value in pairs}
    return {key: value for key, value in first.items() if isinstance(value, str)}


def card(
    recipe: Recipe, plan: PlanRecord, headlines: dict[str, dict[str, float | None]], facts: dict[str, str | int]
) -> str:
    """Markdown with the header that model hubs read.

    `headlines`: dense, pruned and recovered, each as `recover.measure.tasks.headline` gives it.
    `facts`: shown as they are, one a line (tokens, seconds, seed, versions).
    """
    found = origin(recipe.model)
    shown = yaml_values.dump(without_folders(recipe.model_dump(mode="json"))).rstrip()
    lines = [
        _header(found, _data_sets(recipe)),
        f"# {recipe.name}",
        f"A pruned and recovered version of `{_shown(found.get('base_model', recipe.model.source))}`. "
        f"{_what_was_pruned(plan)}",
        "It loads as any checkpoint of its class does: `AutoModelForCausalLM.from_pretrained(folder)`.",
        "## Figures\n\nGenerative and non-generative figures are apart: one average over both would hide a collapse.",
        _table(headlines),
        "## How it was made\n\n" + "\n".join(f"- {name}: {value}" for name, value in facts.items()),
        "## Limits\n\nOnly the tasks of the recipe were measured; other domains, languages and longer texts may have "
        f"suffered unseen. Licence and intended use are those of the dense model.{_masked(plan)}",
        f"## Recipe\n\n```yaml\n{shown}\n```",
    ]
    return "\n\n".join(lines) + "\n"


def plain_card(name: str, plan: PlanRecord, source: str = "") -> str:
    """As `card`, of a model that was exported without a run: what was pruned, and no figures.

    `source`: where the dense model was loaded from, if that is known.
    """
    there = source and (Path(source).exists() or re.fullmatch(HUB_ID, source))
    found = origin(Model(source=source)) if there else {"license": "unknown"}
    loads = "It loads as any checkpoint of its class does: `AutoModelForCausalLM.from_pretrained(folder)`."
    return f"{_header(found, [])}\n\n# {name}\n\nA pruned model. {_what_was_pruned(plan)}\n\n{loads}{_masked(plan)}\n"


def _header(found: dict[str, str], data_sets: list[str]) -> str:
    values: JsonObject = {**found, "library_name": "transformers", "pipeline_tag": "text-generation"}
    values |= {"datasets": data_sets} if data_sets else {}
    values["tags"] = ["pruned", "recover"]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _data_sets(recipe: Recipe) -> list[str]:
    """Hub ids of the data sets that the model was pruned and recovered on."""
    calibration = getattr(recipe.prune, "calibration", None)
    named = [getattr(calibration, "data", None)]
    named += [getattr(source, "prompts", None) or getattr(source, "source", None) for source in recipe.train.data]
    return sorted({name for name in named if isinstance(name, str) and re.fullmatch(HUB_ID, name)})


def _masked(plan: PlanRecord) -> str:
    return f"\n\n{MASKED}" if plan["masks"] else ""


def _shown(source: str) -> str:
    """The source without the folders of the machine it was made on, as code in Markdown can hold it."""
    name = source.rsplit("/", 1)[-1] if source.startswith("/") else source
    return console.visible(" ".join(name.split())).replace("`", "'")


def _what_was_pruned(plan: PlanRecord) -> str:
    became = f"{plan['parameters_dense']:,} parameters became {plan['parameters_pruned']:,}."
    if sites := words.plan_sites(cast(Plan, plan)):
        return f"Of its {plan['blocks']} blocks these are dropped: {sites}. {became}{_zeroed(plan)}"
    if plan.get("config"):
        return f"Every block is narrower ({words.plan_sizes(cast(Plan, plan))}). {became}"
    if not plan["masks"]:
        return f"Its weights were changed by {plan['kind']}. {became}"
    weights = sum(mask["shape"][0] * mask["shape"][1] for mask in plan["masks"].values())
    zeros = sum(mask["zeros"] for mask in plan["masks"].values())
    patterns = ", ".join(sorted({mask["pattern"] for mask in plan["masks"].values()}))
    return (
        f"{zeros:,} of {weights:,} weights in the blocks' linear layers are zero ({zeros / weights:.1%}, {patterns}). "
        "They are stored as ordinary dense tensors: no smaller and no faster in stock kernels."
    )


def _zeroed(plan: PlanRecord) -> str:
    """What a depth plan stores for nothing, if anything."""
    kept = {
        Site(block, part)
        for part in SUBLAYERS
        for block in range(plan["blocks"])
        if block not in words.plan_gone(cast(Plan, plan), part)
    }
    zeroed = zeroed_partners(packed_as(plan.get("parallel", False))(kept))
    return f" Of these, {zeroed} sublayers are zeroed partners of lone ones: they add nothing." if zeroed else ""


def _table(headlines: dict[str, dict[str, float | None]]) -> str:
    rows = ["| | " + " | ".join(headlines) + " |", "|---|" + "---:|" * len(headlines)]
    for key, (called, figure) in headline_figures().items():
        title = f"{key} ({called})" if key in USES else f"{key} (lower is better)" if figure.better == "lower" else key
        values = [headline.get(key) for headline in headlines.values()]
        if any(value is not None for value in values):
            rows.append(f"| {title} | " + " | ".join(_number(figure, value) for value in values) + " |")
    return "\n".join(rows)


def _number(figure: Figure, value: float | None) -> str:
    if value is None:
        return "not measured"
    return figure.worded(value)
