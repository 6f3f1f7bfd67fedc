"""What the settings of a model folder may say: no key makes code be fetched or run, and sizes are those of the weights.

transformers sets every key of config.json as an attribute. Some of them choose code, at any depth and in several
spellings: `attn_implementation: owner/name` is a kernel that is fetched from the hub and imported. Here stands what is
allowed; all else is refused.

Of the other keys those reach transformers that a class declares, under what older versions call them too. It reads some
of them where one would not look for it: another file of settings, another file of weights, sizes of single blocks. A
key that is not on the list is left out; one that stands for another model or other files is refused.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PretrainedConfig

from recover.base import console
from recover.base.artifacts import JsonObject
from recover.base.errors import ModelError
from recover.models import gate

# What a key may say that chooses an implementation. Kernels of packages are allowed where they are installed:
# transformers fetches them from the hub where they are not.
CHOICES: dict[str, tuple[str, ...]] = {
    "attn_implementation": ("eager", "sdpa", "flex_attention"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}
INSTALLED = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
# Keys that hold one of these words choose code too: they may hold numbers, false or null.
WORDS = ("implementation", "kernel", "remote_code", "custom_generate")
# Private attributes of transformers' own that published files set to a text. To the others it may put numbers alone.
PRIVATE = ("_name_or_path", "_commit_hash", "_class_name")
# Of Mamba-2 in some families: true, as in every published file, is what their classes have without it.
AS_BY_DEFAULT = {"use_mamba_kernels": True}
QUANTIZATION = "quantization_config"  # its private keys are torchao's, which looks them up in a list of its own
PATHS = ("special_tokens_map_file",)  # of the machine where the tokenizer was saved; not read
SHOWN = 60  # characters of a value


def check_settings(folder: Path) -> None:
    """Raise ModelError if a settings file of this folder could make a library fetch or run code, by key and value."""
    for path in _settings(folder):
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # who needs this file says so
        check(settings, path)
        if path.name == "tokenizer_config.json":
            _check_tokenizer(settings, path)


def _settings(folder: Path) -> list[Path]:
    """The files of settings that are read at all; another one may be a pipe, or have no end."""
    return [folder / name for name in gate.listed(folder) if fnmatch(name, "*config*.json")]


def check(settings: Any, where: object) -> None:
    """As `check_settings`, for what one file holds."""
    for name, key, value, inside in _walk(settings):
        expected = _expected(key, value, inside)
        if expected is not None:
            raise ModelError(
                f"{where}: {name} is {_short(value)}, with which a library would fetch or run code that is not part of "
                f"it; expected {expected}. Take the key out of the file (the recipe's model.attention says which "
                "attention is used)"
            )


def _expected(key: str, value: Any, inside: bool) -> str | None:
    """What is allowed under this key, where the value is something else; None where it is allowed."""
    if value is AS_BY_DEFAULT.get(key):
        return None
    plain = key.strip("_").removesuffix("_internal")
    if plain in CHOICES:
        names = [*CHOICES[plain], *(name for name in INSTALLED if plain.startswith("attn") and _installed(name))]
        return None if all(cfg is None or cfg in names for cfg in _leaves(value)) else " or ".join(names)
    if plain.endswith("_autoset"):  # whether transformers chose it, as earlier versions wrote
        return None if value is None or isinstance(value, bool) else "true or false"
    if any(word in plain for word in WORDS):
        return None if all(_harmless(cfg) for cfg in _leaves(value)) else "no such key, or null"
    if key.startswith("_") and key not in PRIVATE and not inside and _of_transformers(key):
        return None if all(_harmless(cfg) or isinstance(cfg, bool) for cfg in _leaves(value)) else "no such key"
    return None


def _harmless(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, int | float) and not isinstance(value, bool))


def _of_transformers(key: str) -> bool:
    """Whether setting this attribute replaces one that transformers' classes work with."""
    return any(hasattr(kind, key) or key in vars(kind()) for kind in (PretrainedConfig, GenerationConfig))


def _installed(name: str) -> bool:
    return importlib.util.find_spec(INSTALLED[name]) is not None


def _check_tokenizer(settings: Any, path: Path) -> None:
    """Files that a tokenizer names lie in its folder: transformers would open any other."""
    if not isinstance(settings, dict):
        return
    for key, value in settings.items():
        read = key not in PATHS and not (key == "tokenizer_file" and (path.parent / "tokenizer.json").is_file())
        if key.endswith("_file") and isinstance(value, str) and Path(value).name != value and read:
            raise ModelError(f"{path}: {key} is {_short(value)}; expected a file of this folder: take the key out")
    if settings.get("init_inputs"):
        raise ModelError(f"{path}: init_inputs is {_short(settings['init_inputs'])}; expected no such key: take it out")


def _walk(value: Any, above: str = "", inside: bool = False) -> Iterator[tuple[str, str, Any, bool]]:
    """(path, key, value, whether below a quantization) of every key at every depth."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        name = f"{above}{key}"
        if isinstance(value, dict):
            yield name, str(key), inner, inside
        yield from _walk(inner, f"{name}.", inside or key == QUANTIZATION)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
    else:
        yield value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def code_files(folder: Path) -> list[str]:
    """Names of the files of code in a folder that run with `trust_remote_code`, and of those elsewhere it points to."""
    gate.check_files(folder)
    named: set[str] = {path.name for path in folder.glob("*.py")}
    for path in _settings(folder):
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        named |= code_named(settings)
    return sorted(named)


def code_named(settings: Any) -> set[str]:
    """Files of code that `auto_map` of a settings file names: `modeling_x.py`, or `owner/name: modeling_x.py`."""
    found = settings.get("auto_map") if isinstance(settings, dict) else None
    named = set()
    for cfg in _leaves(found):
        if isinstance(cfg, str):
            repository, _, rest = cfg.rpartition("--")
            named.add(f"{repository}: " * bool(repository) + f"{rest.partition('.')[0]}.py")
    return named


NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads")
SIZES = (*NEEDED, "intermediate_size", "vocab_size", "max_position_embeddings")
MAY_BE_NULL = ("num_key_value_heads", "head_dim", "sliding_window")
FOUR_TIMES = ("n_inner",)  # neurons of an MLP in GPT-2: null for four times the width
# With what is read in their place.
REFUSED = {
    "configuration_files": "the settings would be read from another file",
    "transformers_weights": "the weights would be read from another file",
    "per_layer_config": "single blocks would have other sizes",
    "fusion_config": "parts of the model would be replaced",
}
GEMMA4 = "gemma4"  # whose blocks have heads of two sizes: by number of a block, or one size for all that attend to all
HEADS = ("head_dim", "num_key_value_heads")
OF_GEMMA4 = frozenset(("per_layer_config", "global_head_dim", "num_global_key_value_heads"))
# Of every model: who it is, how it is stored, its sizes (code reads some that its class does not declare), and words of
# older versions for what the classes declare.
ALWAYS = frozenset(
    (
        *SIZES,
        *MAY_BE_NULL,
        *("model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "quantization_config"),
        *("tie_word_embeddings", "is_encoder_decoder", "layer_types", "num_labels", "tokenizer_class"),
        *("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq"),
        *("sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval"),
        *("block_ff_dim", "tie_embedding"),  # LFM2
        "hybrid_override_pattern",  # Nemotron-H
    )
)
# Left out without a word: how it was loaded where it was saved, what the recipe decides, a generation config says, or
# the class computes of other keys; and what transformers copies out of a GGUF file: a name, and an id of the tokenizer.
SILENT = frozenset(
    (
        *("_name_or_path", "name_or_path", "_commit_hash", "auto_map", "_attn_implementation_autoset"),
        *("_model_name_or_path", "unk_token_id"),
        *("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"),
        *("output_attentions", "output_hidden_states", "return_dict", "use_return_dict", "qk_head_dim"),
    )
)
# What a generation config may hold: when a text ends, and how the next token is drawn.
GENERATION = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h"),
    *("typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "no_repeat_ngram_size", "max_length"),
    *("max_new_tokens", "min_length", "min_new_tokens", "use_cache", "_from_model_config", "transformers_version"),
)
# Settings of the parts of a wrapper, each with a class of its own.
NESTED = ("text_config", "vision_config", "audio_config")
NAMES_SHOWN = 3
_said: set[tuple[str, ...]] = set()


def check_keys(config: JsonObject, where: object) -> None:
    """Raise ModelError for a key that stands for another model or other files than those that are looked at."""
    for key in REFUSED.keys() & config.keys():
        if key == "per_layer_config" and _sizes_of_heads(config):
            continue
        if config[key] not in (None, {}, []):
            raise ModelError(f"{where}: {key} is there, and {REFUSED[key]}; expected no such key: take it out")


def _sizes_of_heads(config: dict[str, Any]) -> bool:
    """Whether settings of single blocks are of a family that has them, and say how its heads are and nothing else."""
    blocks = config.get("per_layer_config")
    if not str(config.get("model_type")).startswith(GEMMA4) or not isinstance(blocks, dict):
        return False
    sizes = [size for each in blocks.values() if isinstance(each, dict) for size in each.items()]
    numbers = all(str(number).isdigit() and isinstance(each, dict) for number, each in blocks.items())
    return numbers and all(name in HEADS and type(size) is int and 1 <= size <= MOST for name, size in sizes)


def allowed_of(model_type: str) -> frozenset[str]:
    """The keys that the config class of this type declares, with those of every model; none of an unknown type."""
    if model_type not in CONFIG_MAPPING:
        return frozenset()
    kind: Any = CONFIG_MAPPING[model_type]
    renamed = {*kind.attribute_map, *kind.attribute_map.values()}  # transformers saves under the second
    if dataclasses.is_dataclass(kind):
        declared = {field.name for field in dataclasses.fields(kind) if field.init}
    else:  # a config whose class takes its settings by name
        declared = set(inspect.signature(kind.__init__).parameters)
    return ALWAYS | declared | renamed | (OF_GEMMA4 if model_type.startswith(GEMMA4) else frozenset())


def config_of(raw: JsonObject, source: str, where: object) -> Any:
    """The config that transformers makes of the allowed keys; of the others the user is told, once.

    `source`: what it is called later, in an export's card. Raises whatever transformers does of values that it refuses.
    """
    check_keys(raw, where)
    allowed = allowed_of(raw["model_type"])
    if not allowed:
        allowed = frozenset(raw)  # transformers says that it does not know the type
    left_out: list[str] = []
    kept = _kept(raw, allowed, left_out)
    _say_left_out(sorted(left_out), where)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(kept))
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.name_or_path = source
    return config


def _kept(raw: dict[str, Any], allowed: frozenset[str], left_out: list[str], above: str = "") -> dict[str, Any]:
    """The allowed settings, those of parts by the class of the part; names of the others are added to `left_out`.

    A part whose type is not named, or unknown, is as it is: its wrapper's class says what it takes.
    """
    known = SILENT | GenerationConfig().to_dict().keys()
    left_out += [f"{above}{key}" for key in raw.keys() - allowed - known]
    allowed = allowed - SILENT  # the classes declare some of them
    kept = {key: raw[key] for key in raw if key in allowed and not (key in DTYPE_KEYS and raw[key] == AS_STORED)}
    for key in NESTED:
        if isinstance(inner := kept.get(key), dict) and (known_here := allowed_of(str(inner.get("model_type")))):
            kept[key] = _kept(inner, known_here, left_out, f"{key}.")
    return kept


def _say_left_out(names: list[str], where: object) -> None:
    if names and (str(where), *names) not in _said:
        _said.add((str(where), *names))
        shown = ", ".join(names[:NAMES_SHOWN])
        if len(names) > NAMES_SHOWN:
            shown += f" and {len(names) - NAMES_SHOWN} more"
        console.say(f"{where}: {shown}: transformers does not declare these keys, and they are left out")


def keep_known(generation: Any) -> Any:
    """A generation config of the known keys of this one, all else as transformers has it by default."""
    kept = {name: value for name in GENERATION if (value := getattr(generation, name, None)) is not None}
    return type(generation)(**kept)


DTYPES = ("float32", "bfloat16", "float16", "float64")
DTYPE_KEYS, AS_STORED = ("dtype", "torch_dtype"), "auto"
MOST = 2**40
MOST_BLOCKS = 4096
NO_HARM = 2**27  # parameters that any machine has room for
SMALLEST = {False: 1, True: 8}  # parameters in a byte: fp8, or one bit each where they are quantized


def in_common(config: JsonObject) -> JsonObject:
    """The settings, also under common names where the type has names of its own for them (GPT-2's `n_embd`)."""
    return {**{common: config[name] for common, name in _own_names(config).items() if name in config}, **config}


def _own_names(config: JsonObject) -> dict[str, str]:
    """Of this type, its own names by the common ones."""
    known = isinstance(name := config.get("model_type"), str) and name in CONFIG_MAPPING
    return dict(CONFIG_MAPPING[str(name)].attribute_map) if known else {}


def check_sizes(config: JsonObject, where: object) -> None:
    """Raise ModelError for a size that is no whole number from 1 on, or that no model has; by name and value."""
    own = _own_names(config)
    for name in (*SIZES, *MAY_BE_NULL, *FOUR_TIMES):
        for said in dict.fromkeys((name, own.get(name, name))):
            value = config.get(said, 1)
            if value is None and name in (*MAY_BE_NULL, *FOUR_TIMES):
                continue
            most = MOST_BLOCKS if name == "num_hidden_layers" else MOST
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise ModelError(f"{where}: {said} is {_short(value)}; expected a whole number from 1 to {most:,}")
    config = in_common(config)
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads is not None and kv_heads is not None and heads % kv_heads:
        raise ModelError(
            f"{where}: num_attention_heads is {heads} and num_key_value_heads {kv_heads}; expected a multiple of it"
        )
    padding, rows = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(padding, int) and isinstance(rows, int) and padding >= rows:
        raise ModelError(
            f"{where}: pad_token_id is {padding}, and vocab_size {rows}: no row of the embedding is that token's; give "
            "the padding token's own id, or null"
        )
    for name in DTYPE_KEYS:
        if config.get(name) is not None and str(config[name]).removeprefix("torch.") not in (*DTYPES, AS_STORED):
            raise ModelError(f"{where}: {name} is {_short(config[name])}; expected one of {', '.join(DTYPES)}")
    if not isinstance(config.get("quantization_config"), dict | None):
        raise ModelError(f"{where}: quantization_config is {_short(config['quantization_config'])}; expected a mapping")


def check_room(config: JsonObject, folder: Path) -> None:
    """Raise ModelError where the config, whose sizes are sound, means more parameters than the weights could hold.

    What is too little or too much by less is found by name when the weights are read: this is for what would take all
    memory first.
    """
    held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    meant = _least(in_common(config))
    if held and meant > NO_HARM and meant > held * SMALLEST[bool(config.get("quantization_config"))]:
        raise ModelError(
            f"{folder}: config.json means at least {meant:,} parameters, and its weights are {held:,} bytes: they do "
            "not belong together; fetch the model again"
        )


def _least(config: JsonObject) -> int:
    """Parameters of embedding, attention and MLP matrices, as far as the config names their sizes."""
    if any(config.get(name) is None for name in NEEDED):
        return 0
    width, blocks, heads = (config[name] for name in NEEDED)
    head = config.get("head_dim") or max(1, width // heads)
    kv_heads = config.get("num_key_value_heads") or 1
    attention = 2 * width * head * (heads + kv_heads)
    mlp = 2 * width * config.get("intermediate_size", 0)
    return width * config.get("vocab_size", 0) + blocks * (attention + mlp)
