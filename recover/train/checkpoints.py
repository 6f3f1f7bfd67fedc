"""Files of a training run: adapters, checkpoints to resume from, and which of them can be trusted.

recover/epoch-1/ ...     adapter_model.safetensors, adapter_config.json, MANIFEST.json
recover/best.json        the epoch that generated best, and the score of each
recover/checkpoints/     what a resume needs; gone once the training is finished
recover/data/            text that the dense model wrote
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recover import console, dist
from recover.artifacts import check_manifest, publish, read_json, write_json, write_manifest
from recover.distill.distiller import gathered
from recover.errors import ArtifactError, TrainingError

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS = "adapter_model.safetensors"
STATE = "recover.json"


def write_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter's two files into `folder`. All processes must call it (ZeRO-3 gathers the adapter)."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with gathered(*trained.values()):
        if dist.is_main():
            values = {name: parameter.detach().cpu().clone() for name, parameter in trained.items()}
            state = get_peft_model_state_dict(model, state_dict=values, save_embedding_layers=False)
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous() for name, value in state.items()}, folder / WEIGHTS, {"format": "pt"})
            model.peft_config["default"].save_pretrained(str(folder))
    dist.barrier()


def publish_adapter(model: PeftModel, folder: Path) -> None:
    """As `write_adapter`, with a manifest, and under its name only once it is whole."""
    beside = folder.with_name(f".{folder.name}.tmp")
    dist.on_main(lambda: shutil.rmtree(beside, ignore_errors=True))
    write_adapter(model, beside)
    dist.on_main(lambda: publish(beside, folder))


def read_adapter(model: PeftModel, folder: Path) -> None:
    """Put the adapter of `folder` into the model's.

    Raises:
        ArtifactError: its tensors are not those of this model's adapter.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    state = load_file(folder / WEIGHTS)
    result: Any = set_peft_model_state_dict(model, state)
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    if result.unexpected_keys or len(state) != trained:
        raise ArtifactError(
            f"{folder / WEIGHTS}: holds {len(state)} tensors, this model's adapter has {trained}; "
            f"unknown: {result.unexpected_keys[:3]}. Delete the folder and run the stage again"
        )


def seal(checkpoint: Path, state: dict[str, Any]) -> None:
    """Vouch for a checkpoint that all processes have finished: without this last step it is not resumed from."""
    dist.barrier()
    if dist.is_main():
        write_json(checkpoint / STATE, state)
        write_manifest(checkpoint)
    dist.barrier()


def newest_checkpoint(folder: Path, engine: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose every file is as it was written, and its state; broken ones are named, and deleted.

    Raises:
        TrainingError: it was written by another number of processes, or another DeepSpeed stage, whose shards do
            not fit.
    """
    return dist.on_main(lambda: _newest(folder, engine))


def _newest(folder: Path, engine: str) -> tuple[Path, dict[str, Any]] | None:
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        try:
            check_manifest(checkpoint)
            state = read_json(checkpoint / STATE)
        except ArtifactError as error:
            console.warn(f"not resuming from {checkpoint.name}: {error}")
            shutil.rmtree(checkpoint)
            continue
        if state["engine"] != engine and "zero" in state["engine"] + engine:
            raise TrainingError(
                f"{checkpoint}: written by {state['engine']}, and this is {engine}: DeepSpeed's shards do not fit. "
                f"Launch as before, or delete {folder} to begin anew"
            )
        return checkpoint, state
    return None


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def begin(folder: Path, fingerprint: str) -> None:
    """Clear away what an earlier training left, unless this is the same one and it did not finish."""
    dist.on_main(lambda: _begin(folder, fingerprint))


def _begin(folder: Path, fingerprint: str) -> None:
    stamp = folder / "training.json"
    if stamp.exists() and read_json(stamp) == {"fingerprint": fingerprint, "finished": False}:
        return
    for old in [folder / "checkpoints", *folder.glob("epoch-*")]:
        shutil.rmtree(old, ignore_errors=True)
    (folder / "best.json").unlink(missing_ok=True)
    write_json(stamp, {"fingerprint": fingerprint, "finished": False})


def finish(folder: Path, fingerprint: str) -> None:
    """Mark the training as finished and delete what only a resume would need."""

    def close() -> None:
        write_json(folder / "training.json", {"fingerprint": fingerprint, "finished": True})
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    dist.on_main(close)
