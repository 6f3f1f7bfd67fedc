"""How a view reads a batch token by token: with its own cache, or on a GPU by steps that are recorded once.

A step of a small model is some hundreds of short kernels, and launching them takes ten times as long as they do. The
recorded step is that of `recover.text.decode`: slots for keys and values that stay where they are, and its masks.

Shapes: B batch, T prompt tokens, K columns of the cache, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from recover.models import kv_cache
from recover.models.arch import base_of
from recover.text.decode import _Recorder, may_record
from recover.text.kv import Slots, fits, masks, read

Read = tuple[Tensor, Tensor]  # logits_BV of the last token, and its state after the final norm


class Reader(Protocol):
    """Reads prompts, then one token more of each text at a time."""

    def first(self, ids_BT: Tensor, mask_BT: Tensor) -> Read: ...

    def then(self, token_B: Tensor) -> Read: ...

    def close(self) -> None:
        """No token is read any more."""
        ...


def reader_of(model: Any, state: Callable[[], Tensor], steps: int) -> Reader:
    """What suits the model, the device and the texts; `state`: what the final norm gave for the last token read."""
    base: Any = base_of(model)
    return Recorded(base, state, steps) if may_record(base) and fits(base) else Stock(model, state)


def positions(mask_BT: Tensor) -> Tensor:
    """The place of each token in its own text: padding on the left does not count."""
    return (mask_BT.cumsum(-1) - 1).clamp_min(0)


class Stock:
    """As anyone decodes: the cache that the model makes, padding and all."""

    def __init__(self, model: Any, state: Callable[[], Tensor]) -> None:
        self.model, self.state = model, state
        self.cache: Any = None

    def first(self, ids_BT: Tensor, mask_BT: Tensor) -> Read:
        self.mask_BT = mask_BT
        return self._read(ids_BT)

    def then(self, token_B: Tensor) -> Read:
        self.mask_BT = torch.cat([self.mask_BT, self.mask_BT.new_ones(len(token_B), 1)], 1)
        return self._read(token_B[:, None])

    def close(self) -> None:
        self.cache = None

    def _read(self, ids_BT: Tensor) -> Read:
        output = self.model(
            input_ids=ids_BT,
            attention_mask=self.mask_BT,
            position_ids=positions(self.mask_BT)[:, -ids_BT.shape[1] :],
            use_cache=True,
            logits_to_keep=1,
            **kv_cache.taking(self.model, self.cache),
        )
        self.cache = kv_cache.given_by(output)
        return output.logits[:, -1], self.state()


class Recorded:
    """Prompts without their padding, in slots with room for `steps` more tokens; a step is replayed where it may be.

    What is given is overwritten by the next step.
    """

    def __init__(self, model: Any, state: Callable[[], Tensor], steps: int) -> None:
        self.model, self.state, self.steps = model, state, steps
        self.recorder = _Recorder(self._step) if may_record(model) else None

    def first(self, ids_BT: Tensor, mask_BT: Tensor) -> Read:
        rows, longest = ids_BT.shape
        output, cache, _ = read(self.model, ids_BT, mask_BT, logits_to_keep=1)
        self.slots = Slots(rows, longest + self.steps, ids_BT.device)
        length_B = mask_BT.sum(-1)
        column_T = torch.arange(longest, device=ids_BT.device)
        from_BT = (column_T + longest - length_B[:, None]).clamp(max=longest - 1)  # padding goes behind the text
        cache.kv = {
            layer: (_moved(keys, from_BT), _moved(values, from_BT)) for layer, (keys, values) in cache.kv.items()
        }
        self.slots.fill(self.slots.row_B, cache)
        self.slots.position_B.copy_(length_B)
        self.key_at_1K = torch.arange(self.slots.columns, device=ids_BT.device)[None]
        self.token_B1 = ids_BT[:, -1:].clone()
        self.logits_BV, self.state_BD = output.logits[:, -1].clone(), self.state().clone()
        return self.logits_BV, self.state_BD

    def then(self, token_B: Tensor) -> Read:
        self.token_B1.copy_(token_B[:, None])
        if self.recorder is None:
            self._step()
        else:
            self.recorder.run(self.slots.columns, 1)
        return self.logits_BV, self.state_BD

    def close(self) -> None:
        if self.recorder is not None:
            self.recorder.forget()  # now, and not when the collector comes by

    def _step(self) -> None:
        at_B1 = self.slots.position_B[:, None]
        output = self.model(
            input_ids=self.token_B1,
            attention_mask=masks(self.model, at_B1, self.key_at_1K),
            position_ids=at_B1,
            use_cache=True,
            logits_to_keep=1,
            **kv_cache.taking(self.model, self.slots),
        )
        self.logits_BV.copy_(output.logits[:, -1])
        self.state_BD.copy_(self.state())
        self.slots.position_B += 1


def _moved(read_BHTd: Tensor, from_BT: Tensor) -> Tensor:
    return read_BHTd.gather(2, from_BT[:, None, :, None].expand_as(read_BHTd))
