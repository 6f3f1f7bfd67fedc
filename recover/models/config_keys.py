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

from recover.base import console
from recover.base.errors import ModelError

# With what is read in their place.
REFUSED = {
    "configuration_files": "the settings would be read from another file",
    "transformers_weights": "the weights would be read from another file",
    "per_layer_config": "single blocks would have other sizes",
    "fusion_config": "parts of the model would be replaced",
}
# Of every model: who it is, how it is stored, and words of older versions for what the classes declare.
ALWAYS = frozenset(
    (
        *("model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "quantization_config"),
        *("tie_word_embeddings", "is_encoder_decoder", "layer_types", "num_labels", "tokenizer_class"),
        *("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq"),
        *("sliding_window_pattern", "_sliding_window_pattern"),
    )
)
# Left out without a word: how it was loaded where it was saved, what the recipe decides, or a generation config says.
SILENT = frozenset(
    (
        *("_name_or_path", "name_or_path", "_commit_hash", "auto_map", "_attn_implementation_autoset"),
        *("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"),
        *("output_attentions", "return_dict", "use_return_dict"),
    )
)
# What a generation config may hold: when a text ends, and how the next token is drawn.
GENERATION = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h"),
    *("typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "no_repeat_ngram_size", "max_length"),
    *("max_new_tokens", "min_length", "min_new_tokens", "use_cache", "_from_model_config", "transformers_version"),
)
SHOWN = 3
_said: set[tuple[str, ...]] = set()


def check_keys(config: dict[str, Any], where: object) -> None:
    """Raise ModelError for a key that stands for another model or other files than those that are looked at."""
    for key in REFUSED.keys() & config.keys():
        if config[key] not in (None, {}, []):
            raise ModelError(f"{where}: {key} is there, and {REFUSED[key]}; expected no such key: take it out")


def allowed_of(model_type: str) -> frozenset[str]:
    """The keys that the config class of this type declares, with those of every model; none of an unknown type."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return frozenset()
    kind: Any = CONFIG_MAPPING[model_type]
    if dataclasses.is_dataclass(kind):
        declared = {field.name for field in dataclasses.fields(kind) if field.init}
    else:
        declared = set(inspect.signature(kind.__init__).parameters)
    return ALWAYS | declared | frozenset(kind.attribute_map)


def config_of(raw: dict[str, Any], source: str, where: object) -> Any:
    """The config that transformers makes of the allowed keys; of the others the user is told, once.

    `source`: what it is called later, in an export's card. Raises whatever transformers does of values that it refuses.
    """
    from transformers import AutoConfig, GenerationConfig

    check_keys(raw, where)
    allowed = allowed_of(raw["model_type"])
    if not allowed:
        allowed = frozenset(raw)  # transformers says that it does not know the type
    known = SILENT | GenerationConfig().to_dict().keys()
    _say_left_out(sorted(raw.keys() - allowed - known), where)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({key: raw[key] for key in raw if key in allowed}))
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config._name_or_path = source
    return config


def _say_left_out(names: list[str], where: object) -> None:
    from rich.markup import escape

    if names and (str(where), *names) not in _said:
        _said.add((str(where), *names))
        shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        console.say(escape(f"{where}: {shown}: transformers does not declare these keys, and they are left out"))


def keep_known(generation: Any) -> Any:
    """A generation config of the known keys of this one, all else as transformers has it by default."""
    kept = {name: value for name in GENERATION if (value := getattr(generation, name, None)) is not None}
    return type(generation)(**kept)
