"""The importance matrix: how large the inputs of each matrix are, channel by channel, on text.

A weight's error counts by the mean square of what it is multiplied with: rounding makes sum_i E[x_i^2] (w_i - q_i)^2
small, a layer's error in its output if channels do not depend on each other. Source: llama.cpp's `imatrix`
(tools/imatrix), and its quantizers. Its files are written, for `llama-quantize --imatrix`, and those of `llama-imatrix`
are read.

Shapes: E experts (1 for a plain matrix), I in features, N tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import torch

from recover.base import artifacts, console
from recover.base.errors import ExportError
from recover.export.gguf.family import EXPERTS, ROUTER, tensor_names
from recover.models.experts import IN
from recover.models.gguf_folder import check_head, field
from recover.models.plan import Plan
from recover.models.source import explained
from recover.models.twin import Twin
from recover.prune.stream import Stream, squares

if TYPE_CHECKING:
    from torch import LongTensor, Tensor
    from transformers import PreTrainedModel

SUMS, COUNTS = ".in_sum2", ".counts"  # of a tensor's name, in llama.cpp's file
DATASETS, CHUNKS, CHUNK = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
PARTS_OF_IN = ("gate_proj", "up_proj")  # matrices of an expert that are one in a twin's model


@dataclasses.dataclass(frozen=True)
class Importance:
    """Sums of squares (E, I) and tokens (E,) for each matrix of a GGUF file that was seen, by its name there.

    `text`: what it was measured on, in words; `chunks` samples of up to `chunk` tokens.
    """

    sums: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]
    text: tuple[str, ...]
    chunks: int
    chunk: int

    def of(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """Mean squares (E, I) for a tensor of this shape, all above 0; None for one that was not measured.

        An expert that saw no token weighs its channels alike, as llama.cpp has it. A channel that was 0 throughout
        counts as the least of the others: a weight of nothing would let ggml write anything there.

        Raises ExportError for a tensor of another shape.
        """
        if name not in self.sums:
            return None
        sums_EI, counts_E = self.sums[name], self.counts[name]
        expected = (shape[0] if len(shape) == 3 else 1, shape[-1])
        if sums_EI.shape != expected:
            raise ExportError(
                f"importance of {name}: {sums_EI.shape} numbers, where the matrix takes {expected}: it was measured on "
                "another model; measure it on this one"
            )
        mean_EI = sums_EI / np.maximum(counts_E, 1)[:, None]
        for mean_I in mean_EI:
            above = mean_I[mean_I > 0]
            mean_I[mean_I <= 0] = above.min() if len(above) else 1.0
        return np.ascontiguousarray(mean_EI, dtype=np.float32)


def importance_of(model: PreTrainedModel, batches: Sequence[LongTensor], text: str) -> Importance:
    """What the matrices of a model see on this text, block by block: each sample goes through the model once.

    Embedding and head are not looked at, as in llama.cpp.
    Raises PruneError without text, for samples longer than the context, and for inputs that are not finite.
    """
    stream = Stream(Twin(model, Plan.none(model.config.num_hidden_layers)), batches)
    names = tensor_names(model.config)
    sums, counts = {}, {}
    for index in console.track(range(len(stream.linears)), "importance of channels", unit="blocks"):
        with stream.resident(index), torch.no_grad():
            found = stream.measure(index, _squares_and_count, advance=True)
        for source, measured in found.items():
            for name in _names_in_file(source, names):
                each = measured.reshape(-1, measured.shape[-1]).cpu().double()
                if not each.isfinite().all():
                    raise ExportError(f"{source}: sees inputs that are not finite: look at the weights")
                sums[name], counts[name] = each[:, :-1].float().numpy(), each[:, -1].numpy()
    return Importance(sums, counts, (text,), sum(map(len, batches)), batches[0].shape[1])


def _squares_and_count(x_NI: Tensor) -> Tensor:
    """(I + 1): sums of squares, and last how many tokens they are of."""
    found_I = squares(x_NI)
    return torch.cat([found_I, found_I.new_tensor([len(x_NI)])])


def _names_in_file(source: str, names: dict[str, str]) -> list[str]:
    """Where the input of a module is that of a matrix in the file: of experts' first product, of two."""
    block, _, last = source.rpartition(".")
    if f"{source}.weight" in names:
        found = names[f"{source}.weight"]
        return [] if found.split(".")[-2] in ROUTER.values() else [found]
    parts = PARTS_OF_IN if last == IN else (last,)
    there = [names.get(f"{block}.0.{part}.weight") for part in parts if part in EXPERTS]
    return [name for name in there if name is not None]


def write_importance(importance: Importance, out: Path) -> None:
    """One file in llama.cpp's form, which `llama-quantize --imatrix` reads. Raises ArtifactError."""
    with artifacts.writing(out) as file:
        writer = gguf.GGUFWriter(None, "")
        writer.kv_data[0].pop("general.architecture", None)  # it is of no one model
        writer.add_type("imatrix")
        writer.add_array(DATASETS, list(importance.text))
        writer.add_uint32(CHUNKS, importance.chunks)
        writer.add_uint32(CHUNK, importance.chunk)
        for name in sorted(importance.sums):
            writer.add_tensor(name + SUMS, np.ascontiguousarray(importance.sums[name], dtype=np.float32))
            writer.add_tensor(name + COUNTS, importance.counts[name].astype(np.float32)[:, None])
        try:
            writer.write_header_to_file(Path(file.name))
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def read_importance(path: Path) -> Importance:
    """What `write_importance` or `llama-imatrix` wrote. Raises ModelError or ExportError for any other file."""
    if not path.is_file():
        raise ExportError(f"{path}: no such file; expected an importance matrix, as llama-imatrix writes it, or a text")
    check_head(path, path)
    with explained(str(path)):
        reader = gguf.GGUFReader(path)
        tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    sums, counts = (
        {name.removesuffix(end): data for name, data in tensors.items() if name.endswith(end)} for end in (SUMS, COUNTS)
    )
    if field(reader, "general.type") != "imatrix" or not sums or sums.keys() != counts.keys():
        raise ExportError(
            f"{path}: no importance matrix: expected general.type imatrix, and {SUMS} and {COUNTS} of each matrix, as "
            "llama-imatrix writes them (its older form without GGUF is not read)"
        )
    for name, values_EI in sums.items():
        sums[name], counts[name] = np.atleast_2d(values_EI), counts[name].reshape(-1)
        whole = sums[name].dtype == counts[name].dtype == np.float32 and np.isfinite(values_EI).all()
        if not whole or len(sums[name]) != len(counts[name]) or values_EI.min() < 0 or counts[name].min() < 0:
            raise ExportError(f"{path}: {name}: expected float32 sums of squares, and as many counts as experts")
    text = tuple(map(str, field(reader, DATASETS) or ()))
    return Importance(sums, counts, text, int(field(reader, CHUNKS) or 0), int(field(reader, CHUNK) or 0))
