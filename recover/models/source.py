"""Where a model's files are, and that they are what they say: checked before any library acts on them."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import huggingface_hub
from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file

from recover.base import artifacts, console, dist, hub
from recover.base.artifacts import JsonObject
from recover.base.clock import part
from recover.base.errors import ModelError, RecoverError
from recover.base.products import check_checkpoint, digest_of, hold_lock
from recover.config import recipe
from recover.config.base import Dtype
from recover.models.arch import ARCHS
from recover.models.gate import check_files
from recover.models.gguf_folder import alone, write_stock
from recover.models.refusal import WRAPPER, kind_of_model, unsupported
from recover.models.settings import (
    NESTED,
    check,
    check_keys,
    check_room,
    check_settings,
    check_sizes,
    code_files,
    code_named,
    in_common,
)
from recover.models.wrapper import text_values

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
VOCABULARY = r"(.+\.)?(embed_tokens|lm_head|wte|embed_in|embed_out)\.weight"  # matrices with a row for each token
COMPARED_ROWS = 4096
SAFETENSORS: dict[str, str] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
ADAPTER = "adapter_config.json"
RECORD = "recover.json"  # lies in every checkpoint that we exported
QUIETLY = ("gated_repo", "missing_entries", "connection_errors")  # about a file that need not be there
HUB = " (no folder of this name is here, so a hub id)"
NEAR = 0.6  # likeness of the names of folders, of 1


def kind_of(source: str) -> str:
    """`folder`, `gguf` or `hub`; raises ModelError for a path that is not there and for what is no hub id."""
    path = Path(source).expanduser()
    if source.startswith("embedded:") or os.path.isdir(path):  # False, too, of what can be no file's name
        return "folder"
    if path.suffix == ".gguf" and os.path.isfile(path):
        return "gguf"
    if os.path.exists(path):
        raise ModelError(f"{source}: not a folder and not a .gguf file; expected one of them, or a hub id")
    looks_like_path = source.startswith((".", "/", "~")) or path.suffix == ".gguf" or source.count("/") > 1
    if looks_like_path or not hub.named(source):
        raise ModelError(
            f"{source}: no such folder or .gguf file{_near(path)}, and not a hub id (owner/name): check the name"
        )
    return "hub"


def _near(path: Path) -> str:
    """` (there is 'models/tiny')` of the folder or GGUF file that was probably meant, or nothing."""
    try:
        there = {found.name: found for found in path.parent.iterdir() if found.is_dir() or found.suffix == ".gguf"}
    except OSError:
        return ""
    names = get_close_matches(path.name, there, n=1, cutoff=NEAR)
    return f" (there is '{there[names[0]]}')" if names else ""


def commit_of(cfg: recipe.Model, source: str) -> str:
    """The commit of a hub model, or of the repository that `model.tokenizer` names.

    Raises ModelError, at once where there is no network and no copy in the cache.
    """
    revision = cfg.revision if source == cfg.source else None
    try:
        return hub.commit(hub.Repository("model", source, revision))
    except hub.NoCommit as error:
        raise ModelError(f"{source}: no folder of this name is here{_near(Path(source))}, and {error}") from error


def locate(cfg: recipe.Model, source: str | None = None) -> Path:
    """A local folder in the stock layout: downloaded or converted first if need be. Raises ModelError, RecipeError.

    With several processes all must call this together: the main one downloads or converts, the others find the result.
    """
    source = source or cfg.source
    kind = kind_of(source)
    checked = model_folder if source == cfg.source else whole_folder  # else it is asked for a tokenizer alone
    if kind == "folder":
        return checked(recipe.local_path(source).expanduser())
    with dist.main_first():
        return checked(_convert(Path(source).expanduser()) if kind == "gguf" else _download(cfg, source))


def model_folder(folder: Path) -> Path:
    """As `whole_folder`; ModelError also where transformers would apply an adapter that lies beside the weights."""
    whole_folder(folder)
    _refuse_adapter((folder / ADAPTER).is_file(), folder)
    return folder


def _refuse_adapter(there: bool, where: object) -> None:
    if there:
        raise ModelError(
            f"{where}: holds {ADAPTER} beside a whole model, and transformers would apply that adapter in silence. If "
            "the weights hold it already, or are meant without it, move adapter_config.json and adapter_model.* out of "
            "the folder; else merge it first (peft's merge_and_unload) and save that to another folder"
        )


def whole_folder(folder: Path) -> Path:
    """The folder, which holds a model or a tokenizer.

    ModelError where it is something else that is taken for one, where a file of it is none or too large, and where its
    settings could make code be run.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; expected a model folder with config.json and {WEIGHTS}")
    check_files(folder)
    check_settings(folder)
    if (folder / "config.json").is_file():
        return folder
    if (folder / "recipe.yaml").is_file():
        deploy = folder / "deploy"
        meant = f"its checkpoint is {deploy}" if deploy.is_dir() else "its checkpoint is not exported yet"
        raise ModelError(f"{folder}: a run directory, not a model; {meant}")
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder}: a LoRA adapter, not a model; expected a whole checkpoint (of a run of ours: RUN/deploy; else "
            "merge it into its model with peft's merge_and_unload, and save that)"
        )
    return folder


def _download(cfg: recipe.Model, source: str) -> Path:
    commit = commit_of(cfg, source)
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"] + ["*.py"] * cfg.trust_remote_code
    with explained(source + HUB):
        folder = huggingface_hub.snapshot_download(
            source, revision=commit, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]
        )
    return Path(folder)


def _of_hub(cfg: recipe.Model, name: str) -> Path | None:
    """The file of the model's repository in the hub's cache; None where the repository does not have it."""
    found = cached_file(
        cfg.source,
        name,
        revision=commit_of(cfg, cfg.source),
        **({} if name == CONFIG else {f"_raise_exceptions_for_{each}": False for each in QUIETLY}),
    )
    return None if found is None else Path(found)


def config_source(cfg: recipe.Model) -> str:
    """Where the config can be read without fetching weights: a hub id, or a local folder."""
    return cfg.source if kind_of(cfg.source) == "hub" else str(locate(cfg))


def read_config(cfg: recipe.Model) -> JsonObject:
    """The raw config, no weights touched; raises ModelError if it is missing, corrupt or could run code."""
    source = config_source(cfg)
    if kind_of(source) == "folder":
        return config_in(Path(source))
    with explained(source + HUB):
        config = checked(_read_json(_of_hub(cfg, CONFIG) or Path(CONFIG)), source, Path(source) / CONFIG)
        _refuse_adapter(_of_hub(cfg, ADAPTER) is not None, source)
    return config


def config_in(folder: Path) -> JsonObject:
    """As `read_config`, of a folder that `locate` gave."""
    config = checked(_read_json(folder / CONFIG), str(folder), folder / CONFIG)
    check_room(text_values(config), folder)
    return config


def checked(config: Any, source: str, path: Path) -> JsonObject:
    """The settings of a language model whose keys and sizes are sound; ModelError says which are not."""
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path}: has no 'model_type'; expected the config of a causal language model")
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{source}: '{config['model_type']}' is an encoder-decoder model; expected a decoder alone")
    check(config, path)
    for settings in (config, *(inner for key, inner in config.items() if key in NESTED and isinstance(inner, dict))):
        check_keys(settings, path)
        try:
            check_sizes(settings, path)
        except ModelError:
            if kind_of_model(config) not in (None, WRAPPER) and config["model_type"] not in ARCHS:
                raise ModelError(unsupported(config, ARCHS)) from None  # some have a size for each block
            raise
    return config


def code_of(cfg: recipe.Model) -> list[str] | None:
    """Files of code that `trust_remote_code` lets run, of model and tokenizer folder; None where it is off.

    Of a hub model those that config.json names: nothing else of it is fetched for this.
    """
    if not cfg.trust_remote_code:
        return None
    found: set[str] = set()
    for source in filter(None, (cfg.source, cfg.tokenizer)):
        if kind_of(source) == "folder":
            found |= {str(recipe.local_path(source) / name) for name in code_files(recipe.local_path(source))}
        elif kind_of(source) == "hub" and source == cfg.source:
            found |= {f"{source}: {name}" for name in code_named(read_config(cfg))}
    return sorted(found)


def check_written(folder: Path) -> None:
    """Raise ArtifactError where a checkpoint that we wrote, or converted, is not what was written, by its manifest."""
    if folder.parent == cache_folder() / "gguf":
        check_checkpoint(folder, f"delete {folder}, and the GGUF file is converted again")
    elif (folder / RECORD).is_file():
        check_checkpoint(
            folder,
            "put the file back, or write the checkpoint again (recover run RECIPE --from export); if the change is "
            f"meant, delete {artifacts.MANIFEST}",
        )


WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel or DeepSpeed",
    "_fsdp_wrapped_module.": "FSDP",
    "base_model.model.": "peft (merge the adapter first)",
}


def check_weights(folder: Path) -> None:
    """Every safetensors file of the folder is there, whole and inside it; raises ModelError naming the file."""
    where: dict[str, str] = {}
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        for name, keys in _shards(folder / INDEX).items():
            there = _tensors(folder / name)
            missing = sorted(set(keys) - set(there))
            if missing:
                raise ModelError(f"{folder / name}: lacks {missing[0]}, which {INDEX} lists; fetch the model again")
            for twice in sorted(set(there) & where.keys()):
                if not _equal(folder / name, twice, folder / where[twice], twice):
                    raise ModelError(
                        f"{folder / name}: holds {twice}, and {where[twice]} holds another one, so that one of them "
                        "would be taken by chance; fetch the model again"
                    )
            where |= dict.fromkeys(there, name)
    elif (folder / WEIGHTS).is_file():
        where = dict.fromkeys(_tensors(folder / WEIGHTS), WEIGHTS)
    else:
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise ModelError(
                f"{folder}: its weights are pickle files ({pickles[0]}), which can run code; expected {WEIGHTS}. "
                "If you trust them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
            )
        raise ModelError(f"{folder / WEIGHTS}: missing, and there is no {INDEX} either; expected the model's weights")
    for prefix, wrapper in WRAPPERS.items():
        if where and all(name.startswith(prefix) for name in where):
            raise ModelError(
                f"{folder}: the names of its tensors begin with '{prefix}': the weights were saved from a model inside "
                f"{wrapper}; expected those of the model itself. Save that with save_pretrained, or take the beginning "
                "off each name"
            )


def check_tied(folder: Path, tied: bool) -> None:
    """Raise ModelError where the config ties head and embedding (`tied`) and the weights hold two unlike matrices."""
    if not tied or not ((folder / INDEX).is_file() or (folder / WEIGHTS).is_file()):
        return
    place = tensor_files(folder)
    for head in (name for name in place if re.fullmatch(r"(.+\.)?lm_head\.weight", name)):
        for embedding in (name for name in place if re.fullmatch(r"(.+\.)?(embed_tokens|wte)\.weight", name)):
            if not _equal(place[head], head, place[embedding], embedding):
                raise ModelError(
                    f"{folder}: config.json says that head and embedding are one (tie_word_embeddings), and {head} and "
                    f"{embedding} are unlike in the weights; versions of transformers differ in which they take. Set "
                    "tie_word_embeddings to false in config.json for a head of its own, or take the head out of the "
                    "weights"
                )


def check_rows(folder: Path, rows: int) -> None:
    """Raise ModelError where embedding or head of the weights have not the `rows` that config.json names."""
    for path in _files(folder) if (folder / INDEX).is_file() or (folder / WEIGHTS).is_file() else ():
        for name in _tensors(path):
            if not re.fullmatch(VOCABULARY, name):
                continue
            with safe_open(path, "pt") as file:
                found = file.get_slice(name).get_shape()[0]
            if found != rows:
                raise ModelError(
                    f"{folder}: vocab_size is {rows:,} in config.json, and {name} has {found:,} rows: the vocabulary "
                    f"was resized in one of them. Set vocab_size to {found:,} if the weights are right; else save "
                    "model and tokenizer again, after resize_token_embeddings, with save_pretrained"
                )


def _files(folder: Path) -> list[Path]:
    """The files that the weights are read from."""
    return [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else [folder / name for name in _shards(folder / INDEX)]


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor of the folder, by its name. Raises ModelError for a file that is not whole."""
    return {name: path for path in _files(folder) for name in _tensors(path)}


def _equal(path: Path, name: str, other_path: Path, other_name: str) -> bool:
    """Whether two matrices hold the same numbers; some rows of them in memory at a time."""
    with safe_open(path, "pt") as file, safe_open(other_path, "pt") as other_file:
        first, second = file.get_slice(name), other_file.get_slice(other_name)
        shape = first.get_shape()
        if shape != second.get_shape():
            return False
        if not shape:
            return bool((file.get_tensor(name) == other_file.get_tensor(other_name)).all())
        starts = range(0, shape[0], COMPARED_ROWS)
        parts = ((first[start : start + COMPARED_ROWS], second[start : start + COMPARED_ROWS]) for start in starts)
        return all(bool((one.float() == two.float()).all()) for one, two in parts)


def check_numbers(folder: Path, floating: Collection[str]) -> None:
    """Raise ModelError where the weights hold integers for parameters that compute with fractions (`floating`).

    They are quantized, and without the scales that belong to them they would be taken as they are.
    """
    for path in _files(folder):
        with safe_open(path, "pt") as file:
            for name in set(file.keys()) & set(floating):
                kind = file.get_slice(name).get_dtype()
                if kind.startswith(("I", "U", "BOOL")):
                    raise ModelError(
                        f"{path}: {name} is stored as {kind}, and config.json names no quantization; expected floating "
                        "point numbers: give the checkpoint that it was made from"
                    )


def _shards(index: Path) -> dict[str, list[str]]:
    content = _read_json(index)
    found = content.get("weight_map") if isinstance(content, dict) else None
    weight_map: dict[str, Any] = found if isinstance(found, dict) else {}
    if not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{index}: has no 'weight_map' from tensor names to files; fetch the model again")
    shards: dict[str, list[str]] = {}
    for key, name in weight_map.items():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index}: '{key}' points to '{name}'; expected a .safetensors file in the same folder")
        shards.setdefault(name, []).append(key)
    return shards


def _tensors(path: Path) -> list[str]:
    """Names of the tensors in a file whose header is sound and whose length is what the header says."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except FileNotFoundError as error:
        raise ModelError(f"{path}: missing; fetch the model again") from error
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: corrupt or cut short ({error}); fetch the model again") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: missing; expected a model folder with config.json and {WEIGHTS}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}); fetch the model again") from error


CONVERSION = 5  # raised when the same GGUF file gives another folder than before


def cache_folder() -> Path:
    """Where converted models are kept: $RECOVER_CACHE, or ~/.cache/recover."""
    return Path(os.environ.get("RECOVER_CACHE") or Path.home() / ".cache" / "recover")


def _convert(path: Path) -> Path:
    """The GGUF file as a stock folder in float32, made once for each sha256."""
    folder = cache_folder() / "gguf" / f"{digest_of(path)}-{CONVERSION}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.with_name(f".{folder.name}.lock").touch()
    except OSError as error:
        raise ModelError(
            f"{folder.parent}: models are converted to there, and it cannot be written ({error.strerror}); set "
            "RECOVER_CACHE to a folder that can"
        ) from None
    with _locked(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():  # another run made it in the meantime
            return folder
        console.say(f"converting {path.name} to safetensors, once, into {folder}")
        _tidy(folder)
        with artifacts.scratch(folder) as scratch:
            full = artifacts.explaining_libraries(folder, full_alone=True)
            with part("converting GGUF"), alone(path) as link, explained(str(path)), full:
                write_stock(link, scratch, shown=path)
            artifacts.publish(scratch, folder)
    return folder


def _tidy(folder: Path) -> None:
    """Remove what conversions left that were killed: those of this folder, whose lock we hold, and unlocked ones."""
    ours = re.compile(rf"\.([0-9a-f]{{64}}-\d+)\.\d+{re.escape(artifacts.WRITING)}")
    for left in folder.parent.glob(f".*{artifacts.WRITING}"):
        if (match := ours.fullmatch(left.name)) is None:
            continue
        if match[1] == folder.name or not _is_locked(folder.with_name(f".{match[1]}.lock")):
            shutil.rmtree(left, ignore_errors=True)


def _is_locked(lock: Path) -> bool:
    try:
        with open(lock) as file:
            hold_lock(file)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


@contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """Two runs of one file convert it once: the second waits. The lock goes with its holder, however that ends."""
    with open(lock, "a") as file:
        with suppress(OSError):  # a file system without locks: then both convert it, and the last one stays
            hold_lock(file, wait=True)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Whatever a library raises about files becomes a ModelError that says which model; our own errors pass.

    So does a GPU without memory left, which is no fault of a file.
    """
    try:
        yield
    except RecoverError:
        raise
    except BaseException as error:
        foreign = isinstance(error, Exception) or type(error).__name__ == "PanicException"  # of a library in Rust
        if not foreign or type(error).__name__ == "OutOfMemoryError":
            raise
        reason = " ".join(str(error).split())[:400]
        raise ModelError(f"{where}: cannot be loaded ({type(error).__name__}: {reason})") from error


def context_named(cfg: recipe.Model) -> int | None:
    """Positions that the model was made for, by its config alone; None if it names none. Raises ModelError."""
    config = read_config(cfg)
    found = in_common(text_values(config)).get("max_position_embeddings")
    return found if isinstance(found, int) else None


def stored_dtype(cfg: recipe.Model) -> Dtype:
    """The dtype that the checkpoint's config names, else that of its largest tensor; float32 if it is none of ours.

    Raises ModelError.
    """
    config = read_config(cfg)
    named = (each.get(key) for each in (config, text_values(config)) for key in ("dtype", "torch_dtype"))
    stored = str(next(filter(None, named), None)).removeprefix("torch.")
    if stored not in get_args(Dtype) and kind_of(cfg.source) == "folder":
        stored = _widest_dtype(locate(cfg))
    return next((known for known in get_args(Dtype) if known == stored), "float32")


def exported_dtype(model: Dtype, stored: Dtype, asked: Dtype | None) -> Dtype:
    """The dtype of an export: the one `asked` for, else `model`'s, or the checkpoint's own where that is smaller."""
    if asked is not None:
        return asked
    return stored if model == "float32" else model


def _widest_dtype(folder: Path) -> str:
    """Of the tensor with the most numbers, which says how the checkpoint as a whole is stored."""
    found: dict[int, str] = {}
    for path in _files(folder) if (folder / INDEX).is_file() or (folder / WEIGHTS).is_file() else ():
        for name in _tensors(path):
            with safe_open(path, "pt") as file:
                tensor = file.get_slice(name)
                found[math.prod(tensor.get_shape())] = tensor.get_dtype()
    return SAFETENSORS.get(found[max(found)], "") if found else ""
