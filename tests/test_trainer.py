"""Laws of a whole recovery in one process: what it learns, keeps, refuses, and how it goes on after a stop."""

import json
import os
import signal

import pytest
import torch
import two_processes
from byte_tokenizer import byte_tokenizer
from safetensors.torch import load_file
from tiny import ids, tiny
from transformers import TrainerCallback

from recover.base.artifacts import check_manifest, read_json
from recover.base.errors import DataError, StopRequested, TrainingError
from recover.config.train import split_batch
from recover.models.plan import MaskRecord, Plan
from recover.models.twin import Twin
from recover.train import train as training
from recover.train.course import epoch_ends
from recover.train.train import train
from recover.train.trainer import RecoverTrainer

STEPS = two_processes.STEPS


@pytest.fixture
def folder(tmp_path):
    two_processes.write_text(tmp_path)
    return tmp_path


def depth_twin(**overrides):
    return Twin(tiny(**overrides), Plan("depth", 6, (2, 4)))


def go(folder, twin=None, after_epoch=lambda epoch, context: float(epoch), **changes):
    cfg = two_processes.cfg(folder, **changes)
    return train(twin or depth_twin(), byte_tokenizer(), cfg, folder / "train", after_epoch, seed=3)


def adapter(path):
    return load_file(path / "adapter_model.safetensors")


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, action): `action()` is called when step n (from 1) begins, until `monkeypatch.undo()`."""

    def install(step, action):
        class Act(TrainerCallback):
            def on_step_begin(self, args, state, control, **_):
                if state.global_step + 1 == step:
                    action()

        init = RecoverTrainer.__init__

        def with_callback(trainer, *arguments, **named):
            init(trainer, *arguments, **named)
            trainer.add_callback(Act())

        monkeypatch.setattr(RecoverTrainer, "__init__", with_callback)

    return install


def test_the_loss_falls_and_the_best_adapter_is_published(folder, tmp_path):
    contexts = []

    def after_epoch(epoch, context):
        contexts.append((epoch, context))
        return [0.5, 0.9, 0.9, 0.1][epoch - 1]

    best = go(folder, after_epoch=after_epoch, epochs=4, tokens=2400, lr=3e-3)
    assert best == folder / "train" / "epoch-2"  # the first of equal ones
    record = read_json(folder / "train" / "best.json")
    assert (record["epoch"], record["folder"], record["score"]) == (2, "epoch-2", 0.9)
    assert [entry["score"] for entry in record["epochs"]] == [0.5, 0.9, 0.9, 0.1]
    losses = [context["train"]["loss"] for _, context in contexts]
    assert losses[-1] < 0.8 * losses[0]
    assert [epoch for epoch, _ in contexts] == [1, 2, 3, 4]
    assert contexts[-1][1]["tokens"] >= 2000 and contexts[-1][1]["seconds"] > 0
    assert set(contexts[0][1]["train"]) == {"loss", "kl", "variance", "reverse_kl", "ce", "lr"}
    for epoch in range(1, 5):
        check_manifest(folder / "train" / f"epoch-{epoch}")
    (last,) = (folder / "train" / "checkpoints").iterdir()  # from which the training can be lengthened
    assert last.name == f"checkpoint-{contexts[-1][1]['step']}"


def test_the_published_adapter_gives_the_trained_model(folder):
    from peft import PeftModel

    twin = depth_twin()
    best = go(folder, twin)
    again = depth_twin()
    again.adopt(PeftModel.from_pretrained(again.base, str(best)))
    with torch.no_grad():
        trained, loaded, untrained = (t.model.eval()(input_ids=ids()).logits for t in (twin, again, depth_twin()))
    assert torch.equal(trained, loaded)
    assert not torch.allclose(trained, untrained, atol=1e-3)


def test_the_twin_is_left_usable(folder):
    twin = depth_twin()
    forward = type(twin.base).forward
    go(folder, twin)
    assert "forward" not in vars(twin.base) and type(twin.base).forward is forward
    assert twin.base.generation_config.eos_token_id == tiny().generation_config.eos_token_id
    with twin.dense() as dense, torch.no_grad():
        assert torch.equal(dense(input_ids=ids()).logits, tiny()(input_ids=ids()).logits)


def stopped_at(at_step, folder, step, **changes):
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StopRequested) as caught:
        go(folder, **changes)
    return caught.value


def test_the_variance_fades_step_by_step(folder, monkeypatch):
    logs, log = [], RecoverTrainer.log
    monkeypatch.setattr(RecoverTrainer, "log", lambda trainer, *rest: log(trainer, *rest) or keep(trainer))

    def keep(trainer):
        logs.append(trainer.state.log_history[-1])

    fading = {"kl": 1.0, "variance": 0.6, "variance_until": 0.75, "ce": 0.1, "temperature": 2.0}
    go(folder, tokens=1000, loss=fading)
    rows = [row for row in logs if "kl" in row]
    assert len(rows) == 4
    for row, weight in zip(rows, [0.6, 0.4, 0.2, 0.0], strict=True):
        assert row["variance_weight"] == pytest.approx(weight, abs=1e-12) and row["variance"] > 1e-4
        assert row["loss"] == pytest.approx(4 * (row["kl"] + weight * row["variance"]) + 0.1 * row["ce"], rel=1e-5)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, at_step, monkeypatch, step):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    for path in (straight, stopped):
        path.mkdir()
        two_processes.write_text(path)
    options = {"lora": {"rank": 4, "dropout": 0.2}}  # its random draws must go on too
    expected = adapter(go(straight, **options))
    measured = []
    assert stopped_at(at_step, stopped, step, **options).exit_code == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def after_epoch(epoch, context):
        measured.append((epoch, context["tokens"]))
        return float(epoch)

    found = adapter(go(stopped, after_epoch=after_epoch, **options))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [epoch for epoch, _ in measured] == ([1, 2] if step <= 2 else [2])
    assert read_json(straight / "train/best.json")["epochs"][1] == pytest.approx(
        read_json(stopped / "train/best.json")["epochs"][1]
    )


def test_a_broken_checkpoint_is_passed_over(tmp_path, at_step, monkeypatch, capsys):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for path in (straight, broken):
        path.mkdir()
        two_processes.write_text(path)
    expected = adapter(go(straight))
    stopped_at(at_step, broken, 3, save_steps=1)
    monkeypatch.undo()
    checkpoints = sorted((broken / "train/checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["checkpoint-2", "checkpoint-3"]
    state = checkpoints[-1] / "trained.safetensors"
    state.write_bytes(state.read_bytes()[:-40])
    found = adapter(go(broken, save_steps=1))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "not resuming from checkpoint-3" in capsys.readouterr().err


def test_another_recipe_does_not_go_on_from_it(folder, at_step, monkeypatch, capsys):
    stopped_at(at_step, folder, 2)
    monkeypatch.undo()
    go(folder, lr=5e-3)
    assert "going on from" not in capsys.readouterr().out


def test_rows_in_another_order_are_not_gone_on_with(folder, at_step, monkeypatch, capsys):
    """Padded rows are sorted, packed ones are not: step 2 of the one is not what comes after step 1 of the other."""
    stopped_at(at_step, folder, 2)
    monkeypatch.undo()
    monkeypatch.setattr(training, "packing_configs", lambda _model: [])
    go(folder)
    assert "going on from" not in capsys.readouterr().out


def test_a_measurement_that_fails_is_done_again_and_no_step_is(folder):
    seen = []

    def fails(epoch, context):
        seen.append((epoch, context["step"]))
        if len(seen) == 1:
            raise OSError("no space for the measurement")
        return 1.0

    with pytest.raises(OSError, match="measurement"):
        go(folder, after_epoch=fails)
    go(folder, after_epoch=fails)
    assert seen == [(1, 2), (1, 2), (2, 3)]


def test_a_model_that_is_not_finite_stops_with_a_diagnosis(folder, at_step):
    twin = depth_twin()
    at_step(2, lambda: twin.base.model.norm.weight.data.fill_(float("nan")))
    with pytest.raises(TrainingError, match=r"step 3: the loss is not finite \(.*kl nan.*model\.norm\.weight; load it"):
        go(folder, twin)
    assert all(parameter.isfinite().all() for parameter in twin.model.parameters() if parameter.requires_grad)
    assert read_json(folder / "train/training.json")["skipped"] == 2


def test_patience_stops_and_says_so(folder, capsys):
    scores = [0.5, 0.4, 0.3, 0.9]
    best = go(folder, after_epoch=lambda epoch, _: scores[epoch - 1], epochs=4, tokens=1600, patience=2)
    assert best.name == "epoch-1"
    assert "train.patience" in capsys.readouterr().out
    assert len(read_json(folder / "train/best.json")["epochs"]) == 3


def test_no_gain_over_the_pruned_model_is_said(folder, capsys):
    cfg = two_processes.cfg(folder)
    train(depth_twin(), byte_tokenizer(), cfg, folder / "train", lambda *_: 0.1, seed=0, baseline_score=0.2)
    assert "no epoch generates better than the pruned model before training" in capsys.readouterr().err


def test_without_a_score_the_lowest_loss_is_kept(folder):
    best = go(folder, after_epoch=lambda *_: None)
    epochs = read_json(folder / "train/best.json")["epochs"]
    assert best.name == min(epochs, key=lambda record: record["loss"])["folder"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_after_the_cut_and_checkpointing_train_alike(folder, checkpointing):
    twin = depth_twin()
    best = go(folder, twin, gradient_checkpointing=checkpointing, lora={"rank": 4, "blocks": "after_cut"})
    trained = {name.split("layers.")[1].split(".")[0] for name in adapter(best)}
    assert trained == {"3", "5"}
    reference = folder / "reference"
    reference.mkdir()
    two_processes.write_text(reference)
    plain = adapter(go(reference, lora={"rank": 4, "blocks": "after_cut"}))
    for name, value in adapter(best).items():
        torch.testing.assert_close(value, plain[name], rtol=0, atol=2e-4)


def test_a_masked_bfloat16_model_learns_with_float32_adapters(folder):
    name = "model.layers.1.mlp.down_proj"
    keep = torch.rand(64, 96, generator=torch.Generator().manual_seed(3)) > 0.5
    plan = Plan("magnitude", 6, masks={name: MaskRecord.of(keep, "unstructured")})
    losses = []
    twin = Twin(tiny().to(torch.bfloat16), plan, {name: keep})
    options = {"lr": 3e-3, "tokens": 1500, "loss": {"kl": 1.0, "variance": 0.2, "ce": 0.1, "temperature": 2.0}}
    best = go(folder, twin, lambda _, context: losses.append(context["train"]["loss"]) or 1.0, **options)
    assert {value.dtype for value in adapter(best).values()} == {torch.float32}
    assert losses[1] < losses[0]


def test_float16_is_refused(folder):
    with pytest.raises(TrainingError, match="float16"):
        go(folder, Twin(tiny().to(torch.float16), Plan("depth", 6, (2,))))


def test_too_little_text_for_the_epochs_is_refused(folder):
    with pytest.raises(DataError, match=r"train\.tokens"):
        go(folder, tokens=50)


def test_sizes_that_do_not_come_out_even_are_refused(folder):
    cfg = two_processes.cfg(folder, batch_size=12)
    assert split_batch(cfg, 3).micro == 4 and split_batch(cfg, 3).accumulation == 1
    with pytest.raises(TrainingError, match=r"batch_size: 12 .* 5 processes; give a multiple of 5, such as 10"):
        split_batch(cfg, 5)
    with pytest.raises(TrainingError, match=r"micro_batch_size: 4 does not divide the 6"):
        split_batch(two_processes.cfg(folder, batch_size=12, micro_batch_size=4), 2)


def test_epochs_share_the_steps():
    assert epoch_ends(10, 3) == [3, 7, 10] and epoch_ends(3, 3) == [1, 2, 3]


def test_text_that_the_dense_model_writes_is_what_is_learnt(folder):
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {i}:"}) + "\n" for i in range(10)))
    data = [{"kind": "dense", "prompts": str(prompts), "max_new_tokens": 12, "batch_size": 8}]
    go(folder, data=data, tokens=300)
    (written,) = (folder / "train/data").iterdir()
    stamp = written.stat().st_mtime_ns
    go(folder, data=data, tokens=300)
    assert written.stat().st_mtime_ns == stamp  # a finished training starts anew, from the same text


def test_processes_that_do_not_know_of_each_other_are_refused(folder, monkeypatch):
    """DeepSpeed on a CPU, launched the wrong way: every process takes itself for the only one, on the same data."""
    sizes = [1]  # what the batch is split by; afterwards 2, as launched
    monkeypatch.setattr(training.dist, "world_size", lambda: sizes.pop() if sizes else 2)
    with pytest.raises(TrainingError, match="2 processes were launched, and accelerate sees 1"):
        go(folder)
