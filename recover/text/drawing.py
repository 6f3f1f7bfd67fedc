"""How the next token is chosen: the likeliest, or drawn by numbers that only its text and its place in it decide.

A draw from p is the token with the largest p / e, e ~ Exp(1) for each (the exponential race). The e are a hash of the
text's key, the token's place in the text, and the token. So a text that is drawn depends neither on the rows beside it
nor on the device (up to rounding at ties), nothing is asked of the host, and nothing has to be sorted: where p is cut
to a nucleus, the winner is the first winner that stands in it, among ever likelier tokens.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from recover.kernels import fused

Draw = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits_BV, key_B2, place_B -> token_B

GOLDEN, OTHER, WORD = 0x9E3779B1, 0x85EBCA77, 0xFFFFFFFF


def greedy(logits_BV: Tensor, key_B2: Tensor, place_B: Tensor) -> Tensor:
    """The likeliest token, of equal ones the first."""
    return logits_BV.argmax(-1)


def nucleus(temperature: float, top_p: float) -> Draw:
    """Draws from softmax(z / temperature), cut to the tokens before which likelier ones hold less than `top_p` of it.

    So to the fewest tokens that hold `top_p`, and those as likely as the last of them.
    """

    def draw(logits_BV: Tensor, key_B2: Tensor, place_B: Tensor) -> Tensor:
        if fused.available(logits_BV.device) and logits_BV.dtype in fused.DTYPES:
            return fused.step_kernels().draw(logits_BV, key_B2, place_B, temperature, top_p)
        return drawn(logits_BV, key_B2, place_B, temperature, top_p)

    return draw


def drawn(logits_BV: Tensor, key_B2: Tensor, place_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """token_B; `key_B2`: two words of 32 bits in int64, `place_B`: of the token in its text."""
    z_BV = logits_BV.float() * (1.0 / temperature)
    score_BV = z_BV - waits(key_B2, place_B, z_BV.shape[1]).log()
    if top_p < 1:
        sorted_BV = z_BV.softmax(-1).sort(-1, descending=True)
        before_BV = sorted_BV.values.cumsum(-1) - sorted_BV.values
        last_B1 = (before_BV < top_p).sum(-1, keepdim=True) - 1
        least_B1 = z_BV.gather(1, sorted_BV.indices.gather(1, last_B1))
        score_BV = score_BV.masked_fill(z_BV < least_B1, float("-inf"))
    return score_BV.argmax(-1)


def waits(key_B2: Tensor, place_B: Tensor, vocabulary: int) -> Tensor:
    """Numbers of the exponential distribution, (B, V) in float32, the same for the same key and place."""
    first_B = _mixed(_mixed((place_B * GOLDEN + key_B2[:, 0]) & WORD) ^ key_B2[:, 1])
    second_B = _mixed((first_B + OTHER) & WORD)
    token_V = torch.arange(vocabulary, device=key_B2.device)
    bits_BV = _mixed(_mixed((token_V * GOLDEN + first_B[:, None]) & WORD) ^ second_B[:, None])
    u_BV = bits_BV.float() * 2.0**-32 + 2.0**-33
    small_BV = u_BV * (1.0 + u_BV * (0.5 + u_BV * 0.33333334))
    return torch.where(u_BV < 1e-3, small_BV, -(1.0 - u_BV).log())


def keys(seed: int, numbers: Sequence[int], device: torch.device) -> Tensor:
    """(B, 2): a key for each of these texts, unlike for unlike numbers and seeds."""
    found = []
    for number in numbers:
        word = _spread(_spread(seed & 0xFFFFFFFFFFFFFFFF) ^ number)
        found.append((word & WORD, word >> 32))
    return torch.tensor(found, dtype=torch.long, device=device).view(-1, 2)


def _mixed(x: Tensor) -> Tensor:
    """32 bits in int64, each of which depends on all of x."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & WORD
    return x ^ (x >> 16)


def _spread(word: int) -> int:
    """64 bits, each of which depends on all of the word."""
    whole = 0xFFFFFFFFFFFFFFFF
    word = (word + 0x9E3779B97F4A7C15) & whole
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & whole
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & whole
    return word ^ (word >> 31)
