"""Rounding by importance: measured is what each matrix is multiplied with, and a file errs less where it counts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_checkpoint import VARIANTS, checkpoint
from safetensors.torch import load_file
from small_run import DEPTH, finished, run
from test_gguf import GGML, NO_GGML, WIDER, read, renamed, row_in_checkpoint
from tiny import ids
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from recover import cli
from recover.base.artifacts import read_json
from recover.base.errors import DataError, ExportError, ModelError, RecipeError
from recover.commands import files
from recover.config import recipe
from recover.export.gguf import write as writing
from recover.export.gguf.importance import Importance, importance_of, read_importance, write_importance
from recover.export.gguf.write import weighs, write_gguf
from recover.models.load import load_model

BATCHES: Any = [ids(3, 24, vocabulary=1000), ids(2, 24, vocabulary=1000, seed=2)]
TOKENS = 5 * 24
TEXT = "embedded:tasks/calibration.jsonl"
TYPES = ("q5_1", "q5_0", "q4_1", "q4_0", "q6_k", "q5_k_m", "q4_k_m")


def measured(folder: Path) -> Importance:
    model = load_model(recipe.Model(source=str(folder)))
    return importance_of(model, BATCHES, "ids")


@torch.no_grad()
def seen_by_stock(folder: Path, variant: str) -> dict[str, torch.Tensor]:
    """Sums of squares by name in the file: hooks on a stock model, and experts computed one token at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sums: dict[str, torch.Tensor] = {}

    def linear(name: str) -> Any:
        def see(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
            squares = args[0].double().square().flatten(0, -2).sum(0)
            sums[name] = sums.get(name, torch.zeros_like(squares)) + squares

        return see

    def mixture(block: int, mlp: Any) -> Any:
        def see(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
            h_ND = args[0].flatten(0, 1)
            places = mlp.gate(h_ND)[-1]
            experts = mlp.experts
            for x_D, chosen in zip(h_ND, places, strict=True):
                for expert in chosen.tolist():
                    gate, up = (experts.gate_up_proj[expert] @ x_D).chunk(2)
                    inner = nn.functional.silu(gate) * up
                    for part, x in (("gate", x_D), ("up", x_D), ("down", inner)):
                        name = f"blk.{block}.ffn_{part}_exps.weight"
                        if name not in sums:
                            sums[name] = torch.zeros(len(experts.down_proj), len(x), dtype=torch.float64)
                        sums[name][expert] += x.double().square()

        return see

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(linear(renamed(f"{name}.weight", variant)))
        if hasattr(module, "experts") and hasattr(module, "gate"):
            module.register_forward_pre_hook(mixture(int(name.split(".")[2]), module))
    for ids_BT in BATCHES:
        model(input_ids=ids_BT, use_cache=False)
    return sums


@pytest.mark.parametrize("variant", ["llama", "qwen3_moe"])
def test_it_is_what_each_matrix_is_multiplied_with(variant: str, tmp_path: Path) -> None:
    held_to_stock(variant, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [each for each in VARIANTS if each not in ("llama", "qwen3_moe")])
def test_it_is_so_in_every_family(variant: str, tmp_path: Path) -> None:
    held_to_stock(variant, tmp_path)


def held_to_stock(variant: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "deploy", variant)
    found, expected = measured(folder), seen_by_stock(folder, variant)
    assert found.sums.keys() == expected.keys() and len(expected) >= 4
    for name, sums in expected.items():
        assert found.sums[name] == pytest.approx(sums.reshape(found.sums[name].shape).numpy(), rel=1e-4, abs=1e-9), name
        experts = "_exps" in name
        assert found.counts[name].sum() == (TOKENS * 2 if experts else TOKENS)  # two experts a token
        assert len(found.counts[name]) == len(found.sums[name]) and (experts or len(found.counts[name]) == 1)
    assert (found.chunks, found.chunk, found.text) == (5, 24, ("ids",))


def some(name: str, sums: Any, counts: Any) -> Importance:
    return Importance({name: np.array(sums, dtype=np.float32)}, {name: np.array(counts, dtype=float)}, ("t",), 2, 8)


def test_a_silent_channel_counts_as_the_least_and_a_silent_expert_weighs_alike() -> None:
    found = some("blk.0.ffn_up_exps.weight", [[4, 0, 8], [0, 0, 0]], [2, 0]).of("blk.0.ffn_up_exps.weight", (2, 5, 3))
    assert found is not None and found.tolist() == [[2, 2, 4], [1, 1, 1]] and found.dtype == np.float32
    one = some("a", [[4, 0, 8]], [2])
    assert one.of("b", (5, 3)) is None
    with pytest.raises(
        ExportError, match=r"importance of a: \(1, 3\) numbers, where the matrix takes \(1, 4\): it was"
    ):
        one.of("a", (5, 4))


def test_the_file_is_llama_cpps(tmp_path: Path) -> None:
    path = tmp_path / "below" / "imatrix.gguf"
    made = some("blk.0.ffn_up_exps.weight", [[4, 0, 8], [1, 2, 3]], [2, 3])
    write_importance(made, path)
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        "general.type": "imatrix",
        "imatrix.datasets": ["t"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 8,
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert {name: tensor.shape.tolist() for name, tensor in tensors.items()} == {
        "blk.0.ffn_up_exps.weight.in_sum2": [3, 2],  # ggml's order: the last dimension first
        "blk.0.ffn_up_exps.weight.counts": [1, 2],
    }
    again = read_importance(path)
    assert again.sums["blk.0.ffn_up_exps.weight"].tolist() == [[4, 0, 8], [1, 2, 3]]
    assert again.counts["blk.0.ffn_up_exps.weight"].tolist() == [2, 3] and again.text == ("t",)
    assert (again.chunks, again.chunk) == (2, 8)


def test_any_other_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no such file; expected an importance matrix"):
        read_importance(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("not a file of this kind, and long enough")
    with pytest.raises(ModelError, match="no GGUF file"):
        read_importance(tmp_path / "text.gguf")
    model = write_gguf(recipe.embedded("fable-2m"), tmp_path / "model.gguf")
    with pytest.raises(ExportError, match=r"no importance matrix: expected general\.type imatrix"):
        read_importance(model)
    for sums, counts in (([[float("nan"), 1]], [1]), ([[-1, 1]], [1]), ([[1, 1], [1, 1]], [1])):
        write_importance(some("a", sums, counts), tmp_path / "bad.gguf")
        with pytest.raises(ExportError, match=r"bad\.gguf: a: expected float32 sums of squares"):
            read_importance(tmp_path / "bad.gguf")
    whole = (tmp_path / "bad.gguf").read_bytes()
    (tmp_path / "bad.gguf").write_bytes(whole[:-40])
    with pytest.raises(ModelError, match="cannot be loaded"):
        read_importance(tmp_path / "bad.gguf")


def test_what_has_no_use_of_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = checkpoint(tmp_path / "deploy", "llama"), tmp_path / "out.gguf"
    assert {kind for kind in (*writing.QUANTIZED, *writing.DTYPES) if weighs(kind)} == {*TYPES}
    for kind in ("q8_0", "float32"):
        with pytest.raises(ExportError, match=f"{kind} is rounded without importance"):
            write_gguf(folder, out, kind, some("a", [[1]], [1]))
    monkeypatch.setattr(writing, "_ggml", lambda: None)
    with pytest.raises(ExportError, match=r"q4_0 rounded by importance is made by llama.*q4_0 without importance"):
        write_gguf(folder, out, "q4_0", some("a", [[1]], [1]))
    assert not out.exists()


@pytest.mark.skipif(not GGML, reason=NO_GGML)
@pytest.mark.parametrize(
    "dtype", [pytest.param(each, marks=() if each in ("q4_k_m", "q4_0") else pytest.mark.slow) for each in TYPES]
)
def test_a_file_errs_less_where_it_counts_at_equal_bytes(dtype: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "deploy", "llama", **{**WIDER, "num_hidden_layers": 2})
    importance = measured(folder)
    plain, weighed = tmp_path / "plain.gguf", tmp_path / "weighed.gguf"
    write_gguf(folder, plain, dtype)
    write_gguf(folder, weighed, dtype, importance)
    (_, before), (fields, after) = read(plain), read(weighed)
    types = [
        {tensor.name: (tensor.tensor_type, tensor.n_bytes) for tensor in gguf.GGUFReader(p).tensors}
        for p in (plain, weighed)
    ]
    assert types[0] == types[1]
    assert fields["quantize.imatrix.dataset"] == "ids" and fields["quantize.imatrix.entries_count"] == 14
    assert fields["quantize.imatrix.chunks_count"] == 5
    errors = []
    for name, tensor in load_file(folder / "model.safetensors").items():
        gone = renamed(name)
        if gone not in importance.sums:
            assert np.array_equal(before[gone], after[gone]), name
            continue
        exact = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            exact = np.stack([exact[row_in_checkpoint(row, 64)] for row in range(len(exact))])
        by = importance.of(gone, exact.shape)
        assert by is not None
        errors.append([float((by * (found[gone] - exact) ** 2).sum()) for found in (before, after)])
    plain_error, weighed_error = np.array(errors).sum(0)
    assert weighed_error < 0.97 * plain_error, (plain_error, weighed_error)


@pytest.mark.skipif(not GGML, reason=NO_GGML)
def test_each_expert_is_rounded_by_its_own(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(3, 8, 64)).astype(np.float32)
    by = np.exp(3 * np.random.default_rng(1).normal(size=(3, 64))).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_0
    together = writing._by_ggml(weight, kind, by)
    alone = [writing._by_ggml(weight[expert], kind, by[expert : expert + 1]) for expert in range(3)]
    assert np.array_equal(together, np.stack(alone))
    assert not np.array_equal(together[2], writing._by_ggml(weight[2], kind, by[:1]))


def test_a_recipe_says_what_cannot_be(tmp_path: Path) -> None:
    masked = "prune={kind: magnitude, sparsity: 0.4}"
    for fields, said in (
        (("deploy.importance=true",), r"deploy: importance: true with quantize: null"),
        (("deploy.quantize=q8_0", "deploy.importance=true"), r"deploy: importance: true with quantize: q8_0"),
        ((masked, "deploy.quantize=q4_0", "deploy.importance=true"), r"deploy\.importance: true needs text"),
        (("deploy.quantize=q4_0", "deploy.calibration={data: x.txt}"), r"deploy: calibration is text for importance"),
        (("deploy.importance=perhaps",), r"deploy\.importance: found \"perhaps\": it should be true or false"),
    ):
        with pytest.raises(RecipeError, match=said):
            run(tmp_path, *fields, until="plan")


def test_it_is_by_itself_of_types_with_a_k_where_there_is_text() -> None:
    quickstart = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"

    def text(*fields: str) -> Any:
        return recipe.load_recipe(quickstart, [f"deploy.{field}" for field in fields]).importance_text

    own = recipe.load_recipe(quickstart).prune.calibration  # type: ignore[union-attr]
    assert own is not None and text("quantize=q4_k_m") == text("quantize=q4_0", "importance=true") == own
    assert text() is text("quantize=q4_0") is text("quantize=q4_k_m", "importance=false") is None
    assert text("quantize=q4_k_m", "calibration.data=embedded:tasks/stories.jsonl").data.endswith("stories.jsonl")
    masked = recipe.load_recipe(quickstart, ["prune={kind: magnitude, sparsity: 0.4}", "deploy.quantize=q6_k"])
    assert masked.importance_text is None


@pytest.mark.skipif(not GGML, reason=NO_GGML)
def test_a_run_and_the_command_write_the_same_file(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished(tmp_path_factory, *DEPTH), tmp_path / "quickstart")
    text = (f"deploy.calibration.data={TEXT}", "deploy.calibration.length=64")
    more = ("deploy.importance=true", *text, "deploy.calibration.samples=4")
    directory = run(tmp_path, *DEPTH, "deploy.quantize=q4_1", "deploy.beside=dense", *more)
    files = read_json(directory.gguf / "files.json")
    assert files["deployed"]["importance"] == {"data": TEXT, "samples": 4, "tokens": 256}
    found = read_importance(directory.gguf / "imatrix.gguf")
    assert len(found.sums) == 7 * 10 and found.chunks == 4  # of 10 blocks
    assert len(read_importance(directory.gguf / "dense" / "imatrix.gguf").sums) == 7 * 12
    assert f"by the importance of channels on {TEXT}" in directory.report_md.read_text()
    again = tmp_path / "again.gguf"
    options = ["--dtype", "q4_1", "--importance", str(directory.gguf / "imatrix.gguf")]
    done = CliRunner().invoke(cli.app, ["gguf", str(directory.deploy), str(again), *options])
    assert done.exit_code == 0, done.output
    assert again.read_bytes() == (directory.gguf / "model.gguf").read_bytes()
    own = ["--dtype", "q4_1", "--importance", TEXT]
    done = CliRunner().invoke(cli.app, ["gguf", str(directory.deploy), str(again), *own])
    assert done.exit_code == 0, done.output
    assert gguf.GGUFReader(again).fields["quantize.imatrix.dataset"].contents() == TEXT
    run(tmp_path, *DEPTH, "deploy.quantize=q4_1")
    assert not (directory.gguf / "imatrix.gguf").exists() and not (directory.gguf / "dense" / "imatrix.gguf").exists()
    assert "importance" not in read_json(directory.gguf / "files.json")["deployed"]


def test_the_command_says_what_has_no_use_of_it(tmp_path: Path) -> None:
    for options in ([], ["--dtype", "q8_0"]):
        asked = [
            "gguf",
            str(recipe.embedded("fable-2m")),
            str(tmp_path / "x.gguf"),
            *options,
            "--importance",
            "x.jsonl",
        ]
        done = CliRunner().invoke(cli.app, asked)
        assert done.exit_code == 2 and "has no use of it" in done.output.replace("\n", " ")


def test_a_text_of_importance_that_is_not_there_is_named_with_its_option(tmp_path):
    with pytest.raises(DataError, match=r"--importance .*none\.jsonl: .*no such file"):
        files._measured(recipe.embedded("fable-2m"), str(tmp_path / "none.jsonl"))
