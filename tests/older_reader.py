"""Read folders with whatever transformers is found first, and write what they compute: a child of test_older_readers.

`python older_reader.py OUT FOLDER...`: OUT gets the logits of each folder by its name, as safetensors; standard output
is JSON with the version, the tokens of a text for each folder, and what could not be read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "Anna's 3 cats weigh 12.5 kg,\n\n  and 1024 mice (in all) flee, naïve café."


def main(out: str, *folders: str) -> None:
    """See the module."""
    prompt, logits = torch.arange(3, 43).reshape(2, 20), {}
    told: dict[str, Any] = {"version": transformers.__version__, "tokens": {}, "refused": {}}
    for folder in map(Path, folders):
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
            )
        except Exception as error:  # told to the test
            told["refused"][folder.name] = f"{type(error).__name__}: {error}"[:300]
            continue
        lost = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]
        if lost:
            told["refused"][folder.name] = f"tensors: {lost[:3]}"
        told["tokens"][folder.name] = tokenizer(TEXT)["input_ids"]
        with torch.no_grad():
            logits[folder.name] = model.eval()(input_ids=prompt, use_cache=False).logits.contiguous()
    save_file(logits, out)
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
