"""How much of the model ZeRO-3 gathers at once: a whole block, instead of every layer and adapter by itself.

DeepSpeed's own way is a gathering, a release and four hooks around each module. A block with LoRA has dozens, most of
them tiny, and in a step both views run them and backward once more: the host, not the GPU, then sets the pace.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from recover.base import zero

if TYPE_CHECKING:
    from recover.models.twin import Twin


def gather_by_block(twin: Twin) -> None:
    """To be called before DeepSpeed builds its engine. Blocks that are trained are gathered whole; of the others, which
    run without gradients only, each sublayer: where one is closed it is not called, and nothing is gathered.

    A block that is gathered whole gives its gradients away when its input has got one, so its input must ask for one.
    """
    arch = twin.arch
    for block in twin.blocks:
        trained = any(parameter.requires_grad for parameter in block.parameters())
        parts = [block] if trained else [block.get_submodule(name) for name in (arch.attention, arch.mlp)]
        for part in parts:
            zero.gather_at_once(part)
    model: Any = twin.model
    model.enable_input_require_grads()
