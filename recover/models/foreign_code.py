"""No key of a model folder makes code be fetched or run: what its settings may say where they choose code.

transformers sets every key of config.json as an attribute. Some of them choose code, at any depth and in several
spellings: `attn_implementation: owner/name` is a kernel that is fetched from the hub and imported. Here stands what is
allowed; all else is refused.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

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
