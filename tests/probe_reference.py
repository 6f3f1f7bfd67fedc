"""Tools of the probe tests: tiny models and prompts, and the reference that shares no code with the probe."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from tiny import ids, tiny
from torch import nn

from recover.config import recipe
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.probe.probe import probe

DROPPED = (2, 4)
STEPS = 8
DRIFT = ("embedding", "logit", "logit_raw", "probability", "kl", "reverse_kl", "var_p", "var_r")
CFG = recipe.Probe(samples=5, steps=STEPS, temperatures=(0.5, 1.0, 2.0), batch_size=2)
NO_TOKENIZER = SimpleNamespace(chat_template=None, eos_token_id=None)


def prompts(count: int = 5) -> list[list[int]]:
    """Prompts of different lengths: 6, 9, 12, ... tokens."""
    return [ids(1, 6 + 3 * i, seed=i)[0].tolist() for i in range(count)]


def endless(family: str = "llama", **overrides):
    return tiny(family, eos_token_id=None, **overrides)


def dropping(model, dropped=DROPPED) -> Twin:
    return Twin(model, Plan("depth" if dropped else "none", 6, dropped))


def without_blocks(model, dropped):
    """The reference: a Llama whose blocks are gone."""
    model = copy.deepcopy(model)
    kept = [block for i, block in enumerate(model.model.layers) if i not in dropped]
    for i, block in enumerate(kept):
        block.self_attn.layer_idx = i
    model.model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    return model


@torch.no_grad()
def text_of(model, prompt, steps=STEPS):
    start = torch.tensor([prompt])
    return model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=False, max_new_tokens=steps, pad_token_id=0
    )[0, len(prompt) :]


@torch.no_grad()
def read(model, prompt, text):
    """(logits_SV, [h_SD of each block, the last after the norm]) of a model along one text, one unpadded forward."""
    whole = torch.cat([torch.tensor(prompt), text])[None, :-1]
    output = model(whole, output_hidden_states=True, use_cache=False)
    first = len(prompt) - 1
    return output.logits[0, first:].double(), [h[0, first:] for h in output.hidden_states[1:]]


def textbook_kl(z_dense, z_pruned, temperature=1.0):
    p, q = ((z / temperature).softmax(-1) for z in (z_dense, z_pruned))
    return (p * (p.log() - q.log())).sum(-1)


def of(records, kind):
    return [record for record in records if isinstance(record, kind)]


@functools.cache
def two_models_and_records():
    """(dense model, model without blocks, records of the twin that drops them): random init drifts strongly."""
    dense = endless()
    return dense, without_blocks(dense, DROPPED), probe(dropping(copy.deepcopy(dense)), NO_TOKENIZER, prompts(), CFG)


def apart(records, expected):
    """Where records and expected ones (as JSON) differ by more than rounding; identities are left out."""
    found = []
    for record, other in zip([record.to_json() for record in records], expected, strict=True):
        if record["probe"] != "identity":
            found += differences(record, other, f"{record['probe']} {record.get('step', record.get('block'))}")
    return found


def differences(a, b, where):
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [line for name in a for line in differences(a[name], b[name], f"{where} {name}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [line for at, (one, other) in pairs for line in differences(one, other, f"{where} {at}")]
    if isinstance(a, float):
        equal = isinstance(b, float) and a == pytest.approx(b, rel=1e-3, abs=1e-5)
    else:
        equal = type(a) is type(b) and a == b
    return [] if equal else [f"{where}: {a!r}, expected {b!r}"]
