"""The gate for data of others: what a file may unpack to, what a table's offsets are worth, what a data set may name.

A file of lines is bounded line by line, a gzip file by what comes out of it, a table by what its values take: Arrow
believes offsets that lead out of a file, and a page of some bytes can stand for gigabytes. A data set's own settings
may neither name files outside of it nor have them decoded.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from recover.base.artifacts import loads
from recover.base.errors import DataError, RecipeError
from recover.config import yaml_values

if TYPE_CHECKING:
    from pyarrow import Array, RecordBatch

LONGEST_LINE = 2**25  # characters of a line, which is a row, a cell at most
LONGEST_JSON = 2**30  # characters of a file that is one JSON value
DEEPEST = 100  # lists and objects within one another
FREE = 2**24  # bytes that a file may unpack to, however small it is
TIMES = 100  # its own size, that a larger one may unpack to
ROWS_AT_ONCE = 1024
READERS = ("json", "csv", "parquet", "arrow", "text", "cache")  # of `datasets`; they read rows and open nothing else
SETTINGS = ("README.md", ".huggingface.yaml")  # where a folder may say which files are its data
LARGEST_SETTINGS = 2**24
ARCHIVES = (".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".lz4", ".7z", ".rar")
MEDIA = ("Image", "Audio", "Video", "Pdf", "Mesh", "Nifti", "BioSequence", "BioStructure")


def most_of(path: Path) -> int:
    """Bytes that a packed file, or all files of a folder, may unpack to."""
    files = path.rglob("*") if path.is_dir() else [path]
    return max(FREE, TIMES * sum(file.stat().st_size for file in files if file.is_file()))


class Unpacked(gzip.GzipFile):
    """A gzip file that is read no further than its bound. Raises DataError there."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.path, self.most = path, most_of(path)

    def read1(self, size: int = -1) -> bytes:
        """As of a file."""
        data = super().read1(size)
        if self.tell() > self.most:
            raise DataError(_bomb(self.path, self.most))
        return data


def lines(file: TextIO, path: Path) -> Iterator[str]:
    """The lines of an open file. Raises DataError: one is longer than a row may be."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise DataError(
                f"{path}:{number}: a line of more than {LONGEST_LINE:,} characters; expected one row a line: split it"
            )
        yield line


def parsed(text: str) -> Any:
    """The value of JSON text. Raises ValueError: it is none, a number or the nesting is too long, or a key is twice."""
    value = loads(text)
    if text.count("[") + text.count("{") > DEEPEST and _depth_over(value, DEEPEST):
        raise ValueError(f"lists and objects more than {DEEPEST} deep")
    return value


def _depth_over(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most + 1):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return bool(level)


def batches(path: Path) -> Iterator[RecordBatch]:
    """The rows of a parquet or Arrow file by the thousand, each checked before it is given.

    Raises DataError: they take more memory than such a file may; an error of Arrow: it cannot be read.
    """
    read = _of_parquet if path.suffix.lower() == ".parquet" else _of_arrow
    yield from checked(read(path), path)


def checked(found: Iterator[RecordBatch], path: Path) -> Iterator[RecordBatch]:
    """Batches whose offsets, texts and sizes hold, as many as the file may unpack to.

    Raises DataError; ArrowInvalid: an offset leads out of the file, or a text is not UTF-8.
    """
    most, used = most_of(path), 0
    for batch in found:
        batch.validate(full=True)
        used += 8 * batch.num_rows + sum(map(taken, batch.columns))
        if used > most:
            raise DataError(_bomb(path, most))
        yield batch


def _of_parquet(path: Path) -> Iterator[RecordBatch]:
    from pyarrow import parquet

    most = most_of(path)
    with path.open("rb") as opened, parquet.ParquetFile(opened) as file:
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        if sum(group.total_byte_size for group in groups) > most:
            raise DataError(_bomb(path, most))
        yield from file.iter_batches(batch_size=ROWS_AT_ONCE)


def _of_arrow(path: Path) -> Iterator[RecordBatch]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        try:
            stream = pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:  # the other of Arrow's two forms, with its parts listed at the end
            file = pyarrow.ipc.open_file(source)
            for number in range(file.num_record_batches):
                yield file.get_batch(number)
            return
        yield from stream


def taken(array: Array) -> int:
    """Bytes that the values of an array take when each is written out; of a repeated one, each time.

    Raises ValueError: an array of a kind whose values may lie over one another.
    """
    from pyarrow import BaseExtensionType, types

    kind, each = array.type, 8 * len(array)
    if isinstance(kind, BaseExtensionType):
        return taken(array.storage)
    if types.is_dictionary(kind):
        values: Any = array.dictionary
        if types.is_binary(values.type) or types.is_string(values.type) or types.is_large_string(values.type):
            return each + _total(_lengths(values).take(array.indices))
        return each if types.is_primitive(values.type) else each + len(array) * taken(values)
    if types.is_struct(kind):
        return each + sum(map(taken, array.flatten()))
    if types.is_map(kind):
        return each + taken(array.keys) + taken(array.items)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return each + taken(array.flatten())
    if types.is_null(kind) or types.is_primitive(kind) or types.is_decimal(kind):
        return each
    if any(known(kind) for known in (types.is_binary, types.is_string, types.is_large_binary, types.is_large_string)):
        return each + _total(_lengths(array))
    if types.is_fixed_size_binary(kind):
        return each + kind.byte_width * len(array)
    raise ValueError(f"a column of Arrow's type {kind}; expected texts, numbers, lists and structs")


def _lengths(array: Any) -> Any:
    from pyarrow import compute

    return compute.cast(compute.call_function("binary_length", [array]), "int64")


def _total(lengths: Any) -> int:
    return lengths.sum().as_py() or 0


def _bomb(path: Path, most: int) -> str:
    return (
        f"{path}: unpacks to more than {most:,} bytes, which is {TIMES} times its size or {FREE:,}, whichever is more; "
        "if that is meant, unpack it, and give it as JSONL"
    )


def check_folder(folder: Path) -> None:
    """Look at a folder before `datasets` reads it: what its settings name, and what is packed in it.

    Raises DataError: settings name a file that is not in it; an archive lies there; a file unpacks to too much.
    """
    for name in SETTINGS:
        for found in _named(folder / name):
            if outside(found):
                raise DataError(f"{folder / name}: its data is {found!r}; expected a path inside of the folder")
    for path in sorted(folder.rglob("*")):
        small = path.name.lower()
        if small.endswith(ARCHIVES) and path.is_file():
            raise DataError(f"{path}: an archive, which would be unpacked unseen; unpack it, or take it away")
        if small.endswith(".gz") and path.is_file():
            with Unpacked(path) as packed:
                while packed.read1(2**20):
                    pass
        if small.endswith((".parquet", ".arrow")) and path.is_file():
            for _ in batches(path):
                pass


def outside(name: Any) -> bool:
    """Whether a name of data leads out of the folder that it is said in: another path, another machine, an archive."""
    return not isinstance(name, str) or name.startswith(("/", "~")) or ".." in name.split("/") or ":" in name


def _named(settings: Path) -> Iterator[Any]:
    """Whatever is named as data, at any depth."""
    if not settings.is_file():
        return
    if settings.stat().st_size > LARGEST_SETTINGS:
        raise DataError(f"{settings}: more than {LARGEST_SETTINGS:,} bytes, and is to hold settings")
    text = settings.read_text(encoding="utf-8-sig")
    if settings.suffix == ".md":
        text = text.partition("---")[2].partition("\n---")[0] if text.lstrip().startswith("---") else ""
    try:
        found = yaml_values.load(text, str(settings))
    except RecipeError as error:
        raise DataError(str(error)) from None
    configs = found.get("configs") if isinstance(found, dict) else None
    for config in configs if isinstance(configs, list) else ():
        if isinstance(config, dict):
            yield from _leaves([config.get("data_files"), config.get("data_dir")])


def _leaves(value: Any) -> Iterator[Any]:
    """Every name in it, but those of splits; each object once, since aliases of YAML may repeat one without end."""
    left, seen = [value], set()
    while left:
        item = left.pop()
        if isinstance(item, dict | list):
            if id(item) not in seen:
                seen.add(id(item))
                left += [inner for key, inner in item.items() if key != "split"] if isinstance(item, dict) else item
        elif item is not None:
            yield item


def check_saved(folder: Path) -> None:
    """Look at a folder that `save_to_disk` wrote: its files lie in it. Raises DataError; ValueError: not JSON."""
    listing = folder / "dataset_dict.json"
    splits = _settings(listing).get("splits") if listing.is_file() else None
    for split in splits if isinstance(splits, list) else ():
        if outside(split):
            raise DataError(f"{listing}: a split {split!r}; expected the name of a folder in it")
    for state in [folder / "state.json", *sorted(folder.glob("*/state.json"))]:
        files = _settings(state).get("_data_files") if state.is_file() else None
        for file in files if isinstance(files, list) else ():
            name = file.get("filename") if isinstance(file, dict) else None
            if outside(name):
                raise DataError(f"{state}: its data is {name!r}; expected a file in its folder")


def _settings(path: Path) -> dict[str, Any]:
    if path.stat().st_size > LARGEST_SETTINGS:
        raise DataError(f"{path}: more than {LARGEST_SETTINGS:,} bytes, and is to hold settings")
    found = parsed(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def check_builder(builder: Any, source: str, place: str) -> None:
    """Look at how `datasets` means to read a data set: by one of `READERS`, files whose addresses begin with `place`.

    Raises DataError: it would open others, such as pictures, archives, or an address that the data set names.
    """
    module = type(builder).__module__.rpartition(".")[2]
    if module not in READERS:
        raise DataError(f"{source}: holds files that `datasets` reads as {module!r}; expected {', '.join(READERS)}")
    files = builder.config.data_files
    for name in (file for found in (files or {}).values() for file in found):
        if not str(name).startswith(place):
            raise DataError(f"{source}: its settings name {str(name)!r}, which is no file of it")


def media_columns(features: Any) -> list[str]:
    """The columns whose values `datasets` would open as pictures, sound and the like, wherever they say these lie."""
    return [name for name, feature in (features or {}).items() if _opens(feature)]


def _opens(feature: Any) -> bool:
    if type(feature).__name__ in MEDIA:
        return True
    if isinstance(feature, dict | list):
        return any(map(_opens, feature.values() if isinstance(feature, dict) else feature))
    return _opens(getattr(feature, "feature", None)) if feature is not None else False
