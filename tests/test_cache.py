"""Laws of the states on disk: training from them is training without them, and what is not theirs is refused."""

import functools
import json
import os
import shutil

import pytest
import torch
import two_processes
from byte_tokenizer import byte_tokenizer
from safetensors.torch import load_file
from small_run import QUICKSTART, TEXT
from test_distiller import batch, depth_twin, gradients, scramble, trained
from tiny import tiny
from twins import masked_twin

from recover.base.artifacts import read_json, sha256
from recover.base.errors import ArtifactError, RecipeError
from recover.config.recipe import Cache, Lora, Loss, Train, load_recipe
from recover.distill.distiller import DenseStates, Distiller, scored_rows
from recover.kernels import fused
from recover.models.load import describe
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.run import estimate, stage_work
from recover.run.context import RunContext
from recover.run.directory import RunDirectory
from recover.train import state_cache
from recover.train import state_cache as training
from recover.train.data import packer
from recover.train.state_cache import StateCache, TrainingStates, about, row_key, text_rows, with_states
from recover.train.train import train

WEIGHTS = Loss(kl=1.0, variance=0.3, ce=0.2)


def step(twin, distiller, states=None, **changes):
    out = twin.model.train()(**{**batch(), **changes}, distill=distiller, states=states)
    return out, gradients(out.loss, twin)


def assert_same_step(found, expected):
    assert all(torch.equal(found[0][name], expected[0][name]) for name in ("loss", "kl", "variance", "ce", "tokens"))
    assert all(map(torch.equal, found[1], expected[1]))


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "qwen2_sliding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", ["dense", "dense and prefix"])
def test_a_step_from_states_is_the_step_itself_to_the_bit(family, dtype, parts):
    twin = depth_twin("after_cut", family=family)
    twin.base.to(dtype)
    distiller = Distiller(twin, WEIGHTS)
    expected = step(twin, distiller)
    states = distiller.dense_states(twin.base, **batch())
    if parts == "dense":
        states = DenseStates(states.h_ND)
    assert_same_step(step(twin, distiller, lambda: states), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("parts", ["dense", "dense and prefix"])
def test_checkpointing_changes_no_gradient(reentrant, parts):
    twin = depth_twin("after_cut")
    distiller = Distiller(twin, WEIGHTS)
    _, expected = step(twin, distiller)
    states = distiller.dense_states(twin.base, **batch())
    states = DenseStates(states.h_ND) if parts == "dense" else states
    twin.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    twin.model.enable_input_require_grads()
    twin.model.train()(**batch(), distill=distiller, states=lambda: states).loss.backward()
    for parameter, gradient in zip(trained(twin), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("parts", "runs"), [("nothing", 6 + 2), ("dense", 2 + 2), ("dense and prefix", 2)])
def test_blocks_that_are_known_are_not_run(parts, runs):
    """Six blocks, 2 and 4 dropped: the dense pass runs all, of them 0 and 1 for both; the pruned one runs 3 and 5."""
    twin = depth_twin("after_cut")
    distiller = Distiller(twin, WEIGHTS)
    states = distiller.dense_states(twin.base, **batch())
    given = {"nothing": None, "dense": lambda: DenseStates(states.h_ND), "dense and prefix": lambda: states}[parts]
    calls = []
    for block in twin.blocks:
        block.mlp.gate_proj.register_forward_hook(lambda *_: calls.append(1))
    step(twin, distiller, given)
    assert len(calls) == runs
    assert not any(block.closed for block in (twin.blocks[0], twin.blocks[1])) and twin.closed_blocks == (2, 4)


def test_what_stands_at_padding_changes_nothing():
    twin = depth_twin("after_cut")
    distiller = Distiller(twin, WEIGHTS)
    states = distiller.dense_states(twin.base, **batch())
    assert states.prefix_BTD is not None
    padding = batch()["attention_mask"] == 0
    other = DenseStates(states.h_ND, states.prefix_BTD.masked_fill(padding[:, :, None], 0.0))
    assert not torch.equal(other.prefix_BTD, states.prefix_BTD)
    assert_same_step(step(twin, distiller, lambda: other), step(twin, distiller))


# On disk


def cfg_of(folder, **cache):
    fields = {"lora": {"rank": 4, "blocks": "after_cut"}, "cache": {"folder": str(folder / "states"), **cache}}
    return two_processes.cfg(folder, **fields)


@pytest.fixture
def folder(tmp_path):
    two_processes.write_text(tmp_path)
    return tmp_path


def text(count=7, seed=4):
    """Rows of unlike lengths, in the shape of `build_dataset`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 14, (count,), generator=generator).tolist()
    return [
        {
            "input_ids": torch.randint(3, 256, (length,), generator=generator).tolist(),
            "completion_mask": [0] * 3 + [1] * (length - 3),
        }
        for length in lengths
    ]


COLLATE = packer(0, "completion", 64)


def states_of(folder, twin=None, *, prefix=True):
    twin = twin or depth_twin("after_cut")
    return TrainingStates(Cache(folder=str(folder), prefix=prefix), Distiller(twin, WEIGHTS))


def shards(folder):
    return sorted(folder.rglob("*.safetensors"))


def test_what_is_read_is_what_was_computed(tmp_path):
    """In the batches that filled it to the bit; in others within rounding."""
    states, rows = states_of(tmp_path), text()
    states.fill(rows, COLLATE, 2, shard_bytes=4000)
    assert len(shards(tmp_path)) > 3
    again = states_of(tmp_path)
    for numbers, same in ((range(2, 4), True), ([6], True), ([5, 0, 3], False)):
        data = COLLATE([rows[number] for number in numbers])
        expected = states.distiller.dense_states(states.distiller.twin.base, **data)
        found = with_states(COLLATE, again.read)([rows[number] for number in numbers])["states"]()
        for one, other in ((found.h_ND, expected.h_ND), (found.prefix_BTD, expected.prefix_BTD)):
            assert torch.equal(one, other) if same else torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_rows_that_score_nothing_are_read_too(tmp_path):
    rows = [{**row, "completion_mask": [0] * len(row["input_ids"])} for row in text(4)]
    states_of(tmp_path, prefix=False).fill(rows, COLLATE, 2)
    found = with_states(COLLATE, states_of(tmp_path, prefix=False).read)(rows[2:])["states"]()
    assert found.h_ND.shape == (0, 64)


def adapter_of(folder, name, cfg):
    twin = Twin(tiny(), Plan("depth", 6, (2, 4)))
    best = train(twin, byte_tokenizer(), cfg, folder / name, lambda epoch, _: float(epoch), seed=3)
    return load_file(best / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("prefix", "changes"),
    [(False, {"micro_batch_size": 2}), (True, {}), (True, {"gradient_checkpointing": True, "epochs": 1})],
)
def test_a_training_from_states_ends_in_the_same_bits(folder, prefix, changes):
    cfg = cfg_of(folder, prefix=prefix).model_copy(update=changes)
    expected = adapter_of(folder, "plain", cfg.model_copy(update={"cache": None}))
    found = [adapter_of(folder, "fills", cfg), adapter_of(folder, "reads", cfg)]
    assert all(torch.equal(each[name], expected[name]) for each in found for name in expected)


def test_what_is_there_is_not_computed_again(tmp_path, monkeypatch):
    rows, computed = text(), []
    stock = Distiller.dense_states
    monkeypatch.setattr(
        Distiller,
        "dense_states",
        lambda self, *a, **batch: computed.append(len(batch["packing"][1]) - 1) or stock(self, *a, **batch),
    )
    states_of(tmp_path, prefix=False).fill(rows[:4], COLLATE, 2)
    assert computed == [2, 2]
    states_of(tmp_path, prefix=False).fill([*reversed(rows[:4]), *rows[4:], rows[5]], COLLATE, 2)
    assert computed == [2, 2, 2, 2]  # rows 4 and 5, 6 and 5 again: by their text, not their number
    states_of(tmp_path, prefix=True).fill(rows, COLLATE, 7)
    assert computed[4:] == [7]  # the prefix is another cache
    other_cut = depth_twin("after_cut", dropped=(3,))
    states_of(tmp_path, other_cut, prefix=False).fill(rows, COLLATE, 7)
    assert computed[5:] == []  # the dense states know nothing of what is pruned


def test_a_filling_that_was_killed_goes_on(tmp_path, monkeypatch):
    rows, calls = text(), []
    stock = Distiller.dense_states

    def killed(self, *arguments, **named):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return stock(self, *arguments, **named)

    monkeypatch.setattr(Distiller, "dense_states", killed)
    with pytest.raises(KeyboardInterrupt):
        states_of(tmp_path).fill(rows, COLLATE, 2, shard_bytes=1)
    states = states_of(tmp_path)
    states.fill(rows, COLLATE, 2, shard_bytes=1)
    assert len(calls) == 3 + 2  # of four batches, two were there
    assert not states.dense.missing(row.dense for row in text_rows(COLLATE(rows)))


def test_a_failed_write_leaves_no_shard(tmp_path, monkeypatch):
    states = states_of(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("recover.base.artifacts.os.fsync", full)
    with pytest.raises(ArtifactError, match=r"disk full: [\d,]+ bytes to write"):
        states.fill(text(), COLLATE, 7)
    assert not shards(tmp_path) and not list(tmp_path.rglob(".*.tmp"))


def test_flipped_bits_and_torn_files_are_refused(tmp_path):
    cache, keys = StateCache(tmp_path, {"of": "this"}), [row_key([number], [0]) for number in range(3)]
    cache.write({key: torch.randn(4, 8) for key in keys})
    (path,) = shards(tmp_path)
    whole = path.read_bytes()
    for position in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(bytes(damaged))
        with pytest.raises(ArtifactError, match=r"Delete it and run the same command|no states of a row"):
            StateCache(tmp_path, {"of": "this"}).read(keys)
    path.write_bytes(whole[:-10])
    with pytest.raises(ArtifactError, match=rf"{path.name}: damaged"):
        StateCache(tmp_path, {"of": "this"})


def test_a_damaged_shard_that_is_deleted_is_written_again(tmp_path):
    rows = text(2)
    states_of(tmp_path, prefix=False).fill(rows, COLLATE, 2)
    (path,) = shards(tmp_path)
    whole = path.read_bytes()
    path.unlink()
    states_of(tmp_path, prefix=False).fill(rows, COLLATE, 2)
    assert path.read_bytes() == whole


def test_shards_are_checked_a_few_ahead_each_once_and_what_is_wrong_is_said_when_it_is_read(tmp_path, monkeypatch):
    cache = StateCache(tmp_path, {"states": "some"})
    keys = [bytes([number]) * 32 for number in range(12)]
    for key in keys:
        cache.write({key: torch.full((2, 3), float(key[0]))})
    hashed = []
    monkeypatch.setattr(state_cache, "sha256", lambda path: hashed.append(path) or sha256(path))
    order = keys[::-1]
    cache.expect(order)
    paths = [cache.where[key][0] for key in order]
    data = bytearray(paths[6].read_bytes())
    data[-1] ^= 1
    paths[6].write_bytes(data)
    for number, key in enumerate(order[:6]):
        assert torch.equal(cache.read([key])[0], torch.full((2, 3), float(key[0])))
        cache._checker.submit(int).result()  # what was asked for by now is done
        assert hashed == paths[: number + 1 + state_cache.CHECKED_AHEAD]
    with pytest.raises(ArtifactError, match="damaged"):
        cache.read([order[6]])


def test_a_shard_that_goes_while_training_is_named(tmp_path):
    rows = text(2)
    states = states_of(tmp_path, prefix=False)
    states.fill(rows, COLLATE, 2)
    batch = with_states(COLLATE, states.read)
    shards(tmp_path)[0].unlink()
    with pytest.raises(ArtifactError, match=r"safetensors: gone\. Run the same command again"):
        batch(rows)["states"]()
    with pytest.raises(ArtifactError, match=r"no states of a row"):
        batch(text(1, seed=9))["states"]()


def changed_weight(twin):
    twin.base.model.layers[5].mlp.down_proj.base_layer.weight.data[3, 4] += 1e-3


def changed_rope(twin):
    twin.base.config.rope_parameters = {**twin.base.config.rope_parameters, "rope_theta": 5e5}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (changed_weight, "weights"),
        (changed_rope, "config"),
        (lambda twin: twin.base.to(torch.bfloat16), "dtype"),
        (lambda twin: twin.base.set_attn_implementation("eager"), "attention"),
        (lambda twin: setattr(twin.base, "_supports_attention_backend", False), "rows"),
    ],
)
def test_states_of_another_model_are_not_read(tmp_path, change, field):
    rows = text(2)
    before, twin = about(depth_twin("after_cut")), depth_twin("after_cut")
    states_of(tmp_path).fill(rows, COLLATE, 2)
    change(twin)
    assert before[field] != about(twin)[field]
    other = states_of(tmp_path, twin)
    assert len(other.dense.missing(row.dense for row in text_rows(COLLATE(rows)))) == 2


def test_pruning_and_adapters_change_no_dense_state_but_other_libraries_may(monkeypatch):
    twins = [depth_twin("after_cut"), depth_twin("all", seed=8), Twin(tiny(), Plan.none(6)), masked_twin(tiny())]
    first, *others = (about(twin) for twin in twins)
    assert others == [first] * 3
    monkeypatch.setattr(state_cache.transformers, "__version__", "9.9")
    assert about(twins[0])["libraries"] != first["libraries"]


def test_states_that_fused_kernels_made_are_told_from_others(monkeypatch):
    twin = depth_twin("after_cut")
    eager = about(twin)
    monkeypatch.setattr(fused, "available", lambda _device: True)
    with_kernels = about(twin)
    assert with_kernels != eager and with_kernels == {**eager, "kernels": fused.VERSION}
    twin.switch.kernels = False
    assert about(twin) == eager


def returning_tuples(model):
    """Blocks that give tuples, and what is first in one is handed on, as for Granite in transformers 5.3."""

    def unwrap(_module, inputs):
        assert isinstance(inputs[0], tuple)
        return (inputs[0][0], *inputs[1:])

    for block in model.model.layers:
        stock = type(block)
        forward = lambda self, *args, stock=stock, **kwargs: (stock.forward(self, *args, **kwargs),)  # noqa: E731
        block.__class__ = type(stock.__name__, (stock,), {"forward": functools.wraps(stock.forward)(forward)})
    for module in (*model.model.layers[1:], model.model.norm):
        module.register_forward_pre_hook(unwrap)
    return model


def test_blocks_that_return_tuples():
    plain, twin = depth_twin("after_cut"), Twin(returning_tuples(tiny()), Plan("depth", 6, (2, 4)))
    twin.add_lora(Lora(rank=4, blocks="after_cut"))
    scramble(twin, 7)
    expected = step(plain, Distiller(plain, WEIGHTS))
    states = Distiller(plain, WEIGHTS).dense_states(plain.base, **batch())
    for given in (lambda: states, lambda: DenseStates(states.h_ND), None, lambda: states):  # the first before any pass
        assert_same_step(step(twin, Distiller(twin, WEIGHTS), given), expected)


def test_a_folder_that_was_filled_by_something_else_is_refused(tmp_path):
    states = states_of(tmp_path, prefix=False)
    states.fill(text(2), COLLATE, 2)
    path = states.dense.folder / "about.json"
    path.write_text(json.dumps({**read_json(path), "weights": "another"}))
    with pytest.raises(ArtifactError, match=rf"{states.dense.folder}/about\.json: .*\(weights differ\)\. Delete"):
        states_of(tmp_path, prefix=False)


def test_rows_are_known_by_tokens_and_positions():
    keys = [row_key([1, 2, 3], [0, 1]), row_key([1, 2], [0, 1]), row_key([1, 2, 3], [1]), row_key([1, 2], [3, 0, 1])]
    assert len(set(keys)) == 4 and row_key(torch.tensor([1, 2, 3]), [0, 1]) == keys[0]
    rows = text_rows(batch())
    assert [row.tokens for row in rows] == [12, 9, 12] and [row.scored for row in rows] == [8, 5, 8]
    assert sum(row.scored for row in rows) == len(scored_rows(batch()["labels"])[0])


def test_a_disk_without_room_is_refused_before_anything_runs(tmp_path, monkeypatch):
    states = states_of(tmp_path)
    rows = text()
    free = shutil.disk_usage(tmp_path)._replace(free=9_000)
    monkeypatch.setattr(training.shutil, "disk_usage", lambda _: free)
    scored, tokens = (sum(getattr(row, name) for row in text_rows(COLLATE(rows))) for name in ("scored", "tokens"))
    needed = (scored + tokens) * 64 * 4
    with pytest.raises(ArtifactError, match=rf"train\.cache needs {needed:,} bytes more, 9,000 are free"):
        states.fill(rows, COLLATE, 2)


def test_a_prefix_needs_shared_blocks():
    data = [{"kind": "given", "source": "x"}]
    with pytest.raises(ValueError, match=r"cache\.prefix: both views share no block"):
        Train.model_validate({"data": data, "cache": {"folder": "x", "prefix": True}})


PREFIX = "{folder: states, prefix: true}"


def plan_of(folder, cache, *more):
    overrides = [*TEXT, f"train.cache={cache}", "train.lora.blocks=after_cut", "train.tokens=1000", *more]
    recipe = load_recipe(QUICKSTART, overrides)
    found = stage_work.checked(RunContext(recipe, RunDirectory(folder / recipe.name)))
    return recipe, found["estimate"]["cache_bytes"]


def test_plan_says_what_it_takes_on_disk(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe, both = plan_of(tmp_path, PREFIX)
    width = describe(recipe.model).width
    assert recipe.train.cache.folder == str(tmp_path / "states")  # there is none yet, and it is a folder all the same
    assert both == 2 * 1000 * width * 4 and "dense states on disk" in capsys.readouterr().out
    assert plan_of(tmp_path, "{folder: states}")[1] == 1000 * width * 4
    capsys.readouterr()
    assert plan_of(tmp_path, "null")[1] == 0 and "dense states on disk" not in capsys.readouterr().out


def test_plan_refuses_a_full_disk_but_counts_what_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    free = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda _: free)
    with pytest.raises(RecipeError, match=r"train\.cache\.folder: .* has 0 of them and 1,000,000 free: make room"):
        plan_of(tmp_path, PREFIX, "train.tokens=100_000")
    (tmp_path / "states/0123").mkdir(parents=True)
    with open(tmp_path / "states/0123/x.safetensors", "wb") as file:
        file.truncate(10**9)
    plan_of(tmp_path, PREFIX, "train.tokens=100_000")


def test_left_over_temporary_files_go_only_when_old(tmp_path):
    cache = StateCache(tmp_path, {"a": 1})
    cache.write({row_key([1], [0]): torch.ones(1, 2)})
    old, new = (cache.folder / f".{digit * 64}.safetensors.7.tmp" for digit in "0a")
    others = cache.folder / ".notes.7.tmp"
    for path in (old, new, others):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    os.utime(others, (0, 0))
    cache.tidy()
    assert not old.exists() and new.exists() and others.exists()
