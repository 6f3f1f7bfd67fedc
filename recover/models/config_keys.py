"""What of a config.json reaches transformers: the keys that a class declares, and what older versions call them.

transformers makes an attribute of every key, and reads some of them where one would not look for it: another file of
settings, another file of weights, sizes of single blocks. A key that is not on the list is left out; one that stands
for another model or other files is refused.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.markup import escape
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig

from recover.base import console
from recover.base.artifacts import JsonObject
from recover.base.errors import ModelError

NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads")
SIZES = (*NEEDED, "intermediate_size", "vocab_size", "max_position_embeddings")
MAY_BE_NULL = ("num_key_value_heads", "head_dim", "sliding_window")
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
    )
)
# Left out without a word: how it was loaded where it was saved, what the recipe decides, a generation config says, or
# the class computes of other keys.
SILENT = frozenset(
    (
        *("_name_or_path", "name_or_path", "_commit_hash", "auto_map", "_attn_implementation_autoset"),
        *("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"),
        *("output_attentions", "return_dict", "use_return_dict", "qk_head_dim"),
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
SHOWN = 3
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
    config._name_or_path = source
    return config


def _kept(raw: dict[str, Any], allowed: frozenset[str], left_out: list[str], above: str = "") -> dict[str, Any]:
    """The allowed settings, those of parts by the class of the part; names of the others are added to `left_out`.

    A part whose type is not named, or unknown, is as it is: its wrapper's class says what it takes.
    """
    known = SILENT | GenerationConfig().to_dict().keys()
    left_out += [f"{above}{key}" for key in raw.keys() - allowed - known]
    kept = {key: raw[key] for key in raw if key in allowed and not (key in DTYPE_KEYS and raw[key] == AS_STORED)}
    for key in NESTED:
        if isinstance(inner := kept.get(key), dict) and (known_here := allowed_of(str(inner.get("model_type")))):
            kept[key] = _kept(inner, known_here, left_out, f"{key}.")
    return kept


def _say_left_out(names: list[str], where: object) -> None:
    if names and (str(where), *names) not in _said:
        _said.add((str(where), *names))
        shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        console.say(escape(f"{where}: {shown}: transformers does not declare these keys, and they are left out"))


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


def check_sizes(config: JsonObject, where: object) -> None:
    """Raise ModelError for a size that is no whole number from 1 on, or that no model has; by name and value."""
    for name in (*SIZES, *MAY_BE_NULL):
        value = config.get(name, 1)
        if value is None and name in MAY_BE_NULL:
            continue
        most = MOST_BLOCKS if name == "num_hidden_layers" else MOST
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ModelError(f"{where}: {name} is {_short(value)}; expected a whole number from 1 to {most:,}")
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
    meant = _least(config)
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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
