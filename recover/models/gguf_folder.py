"""A GGUF file written as a stock folder: config, tokenizer, and weights in float32.

transformers opens the file once for each thing that it wants of it, and the reader of the package
`gguf` takes every token of the vocabulary apart through a memory map, at some tens of microseconds each: with 150,000
tokens that is most of the time. Here the file is opened once, and its bytes are a plain array.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from recover.base.errors import ModelError
from recover.models.gguf_settings import completed
from recover.models.gguf_tokenizer import split_and_checked
from recover.models.gguf_whole import check_tensors


def write_stock(path: Path, folder: Path, *, shown: Path) -> None:
    """Write the model and tokenizer of the file, which lies `alone`, to the folder; errors name it as `shown`.

    Raises ModelError for tensors as `check_tensors`; else whatever the libraries raise.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with _opened_once():
        check_tensors(path, shown)
        reader = gguf.GGUFReader(path)
        config = completed(AutoConfig.from_pretrained(**where), reader)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **where, config=config, dtype=torch.float32, output_loading_info=True
        )
        read, info = loaded
        if info["missing_keys"]:  # for families whose names `check_tensors` does not know
            names = sorted(map(str, info["missing_keys"]))
            raise ModelError(f"{shown}: lacks {len(names)} tensors of its model, such as {names[0]}: fetch it again")
        _plain(read).save_pretrained(folder)
        tokenizer = split_and_checked(AutoTokenizer.from_pretrained(**where), reader, shown)
        tokenizer.save_pretrained(folder)


def _plain(read: Any) -> Any:
    """The same weights in a model that was never quantized.

    transformers flags what it reads from a GGUF: `save_pretrained` would raise, and peft and trainers branch on the
    flag.
    """
    import accelerate
    import torch
    from transformers import AutoModelForCausalLM

    config = type(read.config).from_dict(
        {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    )
    with accelerate.init_empty_weights():  # no random numbers for weights that are there
        plain: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict(), strict=True, assign=True)
    plain.tie_weights()
    plain.generation_config = read.generation_config
    return plain


@contextmanager
def _opened_once() -> Iterator[None]:
    """Inside, every `gguf.GGUFReader` of a file is the first one of that file, and so are its lists of names."""
    stock: Any = gguf.GGUFReader
    opened: dict[str, Any] = {}

    class Plain(stock):
        """What the reader cuts out of `data`, it cuts out of an array: cutting a memory map is ten times slower."""

        @property
        def data(self) -> Any:
            return self._array

        @data.setter
        def data(self, mapped: Any) -> None:
            self._array = mapped.view(type=np.ndarray)

    def reader(path: Any, mode: str = "r") -> Any:
        if str(path) not in opened:
            opened[str(path)] = Plain(path, mode)
        return opened[str(path)]

    names = gguf.get_tensor_name_map
    # transformers looks both up there each time; it makes the names of a whole model anew for each of its modules.
    gguf.GGUFReader, gguf.get_tensor_name_map = reader, functools.cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = stock, names
