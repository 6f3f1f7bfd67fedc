"""The rows of `step.py` as models with a loss: two plain ones, or recover's twin.

Legend: B batch, T tokens, N scored tokens, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from step_cost import Shape
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from recover.config.recipe import Lora, Loss
from recover.distill.distiller import Distiller, GraphedPasses
from recover.models.attention import PACKED_NAME, attending
from recover.models.lean import LeanAttention, LeanMlp, LeanNorm
from recover.models.masked_lora import lora_layers
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.train.data import packer, with_scored

RANK = 16
LOGIT_SPREAD = 5.5  # standard deviation of a logit
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Built:
    """A model to train, and what makes one step's mean KL per token of a batch (B, T), with gradient.

    `replayed` does so with backward, in place of both.
    """

    model: Any
    loss: Callable[[Tensor], Tensor]
    replayed: Callable[[Tensor], Tensor] | None = None

    def pass_and_back(self, ids_BT: Tensor) -> Tensor:
        """The loss, its gradient added to that of the model's parameters."""
        if self.replayed is not None:
            return self.replayed(ids_BT)
        loss = self.loss(ids_BT)
        loss.backward()
        return loss.detach()


class Bench:
    """The shape, the device, and models made anew from the same seed: all rows have the same weights."""

    def __init__(self, shape: Shape, device: torch.device, batch: int, length: int, chunk: int) -> None:
        self.shape, self.device, self.chunk = shape, device, chunk
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator().manual_seed(1)
        self.ids_BT = torch.randint(3, shape.vocabulary, (batch, length), generator=generator).to(device)

    def dense(self) -> PreTrainedModel:
        sizes: dict[str, Any] = self.shape.config()
        config = Qwen2Config(
            **sizes, max_position_embeddings=max(4096, self.ids_BT.shape[1]), tie_word_embeddings=False
        )
        torch.manual_seed(0)
        with self.device:
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype, attn_implementation="sdpa")
        head: Any = model.get_output_embeddings()
        nn.init.normal_(head.weight, std=LOGIT_SPREAD / self.shape.width**0.5)
        return model.eval().requires_grad_(False)

    def autocast(self) -> Any:
        """As transformers' Trainer does with bf16."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype is torch.bfloat16)

    def plain(self, kind: str, *, dropped: Sequence[int], checkpointing: bool = False) -> Built:
        teacher = self.dense()
        student = get_peft_model(
            without(teacher, dropped),
            LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEARS, task_type="CAUSAL_LM"),
        )
        prepare(student, checkpointing)
        loss = {"kl": full_kl, "trl": trl_kl, "liger": liger_kl}[kind]

        def run(ids_BT: Tensor) -> Tensor:
            with self.autocast():
                return loss(student, teacher, ids_BT)

        return Built(student, run)

    def recover(
        self,
        *,
        dropped: Sequence[int],
        blocks: Any = "all",
        checkpointing: bool = False,
        known: str = "nothing",
        stock: Sequence[str] = (),
    ) -> Built:
        """`stock`: what is left as transformers, peft or torch has it.

        "blocks", "kernels" of blocks, "adapters", "inputs" of adapters.
        """
        twin = Twin(self.dense(), Plan("depth" if dropped else "none", self.shape.blocks, tuple(dropped)))
        twin.add_lora(Lora(rank=RANK, blocks=blocks))
        for module in twin.base.modules() if "blocks" in stock else ():
            if isinstance(module, LeanMlp | LeanNorm | LeanAttention):
                module.__class__ = type(module).__bases__[1]
        twin.switch.kernels = "kernels" not in stock
        for layer in lora_layers(twin.model):
            one: Any = layer
            if "adapters" in stock:
                one.foldable = lambda _x: None
            if "inputs" in stock:
                one._cast_input_dtype = lora.Linear._cast_input_dtype.__get__(layer)
        prepare(twin.model, checkpointing)
        distiller = Distiller(twin, Loss(chunk=self.chunk))
        self.distillers = [distiller]
        options: dict[str, Any] = {"distill": distiller}
        if known != "nothing":
            states = self.states(twin, distiller, prefix=known == "all")
            options["states"] = lambda: states

        def run(ids_BT: Tensor) -> Tensor:
            sums = twin.model(input_ids=ids_BT, attention_mask=None, labels=ids_BT, **options)
            return sums["loss"] / sums["tokens"]

        return Built(twin.model, run)

    def graphed(self, *, dropped: Sequence[int]) -> Built:
        """recover's twin, its sequences packed into one row, its passes replayed as CUDA graphs."""
        built = self.recover(dropped=dropped)
        twin_model: Any = built.model
        distiller = self.distillers[-1]
        graphs = GraphedPasses(distiller, [each for each in twin_model.parameters() if each.requires_grad])
        rows = [{"input_ids": ids_T, "completion_mask": ids_T != -1} for ids_T in self.ids_BT.cpu().numpy()]
        made = with_scored(packer(0, "all", self.ids_BT.shape[1]))(rows)
        batch = send_to_device(made, self.device)
        tokens = len(batch["scored"][0])

        def plain(_ids_BT: Tensor) -> Tensor:
            with attending(distiller.packs, PACKED_NAME):
                return twin_model(**batch, distill=distiller)["loss"] / tokens

        def replayed(ids_BT: Tensor) -> Tensor:
            graphs.bring_gradients()
            if self.device.type != "cuda" or not graphs.takes(batch):
                loss = plain(ids_BT)
                loss.backward()
                return loss.detach()
            return graphs.step(batch, torch.tensor(1 / tokens, device=self.device))["loss"].detach() / tokens

        return Built(twin_model, plain, replayed)

    def states(self, twin: Twin, distiller: Any, *, prefix: bool) -> Any:
        """The dense model's states of the batch, in host memory."""
        from recover.distill.distiller import DenseStates

        batch = {"input_ids": self.ids_BT, "attention_mask": None, "labels": self.ids_BT}
        found = distiller.dense_states(twin.base, **batch)
        prefix_BTD = found.prefix_BTD if prefix else None
        return DenseStates(self.held(found.h_ND), None if prefix_BTD is None else self.held(prefix_BTD))

    def held(self, tensor: Tensor) -> Tensor:
        return tensor.cpu().pin_memory() if self.device.type == "cuda" else tensor.clone()


def without(dense: PreTrainedModel, dropped: Sequence[int]) -> PreTrainedModel:
    """A stock model of the other blocks, with weights of its own."""
    model: Any = copy.deepcopy(dense)
    kept = [block for number, block in enumerate(model.model.layers) if number not in dropped]
    for number, block in enumerate(kept):
        block.self_attn.layer_idx = number
    model.model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    model.config.layer_types = model.config.layer_types[: len(kept)]
    return model


def prepare(model: Any, checkpointing: bool) -> None:
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()


def full_kl(student: Any, teacher: Any, ids_BT: Tensor) -> Tensor:
    """As in a textbook: both sides' logits whole, in fp32, and autograd."""
    with torch.no_grad():
        y_NV = teacher(input_ids=ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
    z_NV = student(input_ids=ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
    log_q_NV, log_p_NV = z_NV.float().log_softmax(-1), y_NV.float().log_softmax(-1)
    return F.kl_div(log_q_NV, log_p_NV, reduction="batchmean", log_target=True)


def trl_kl(student: Any, teacher: Any, ids_BT: Tensor) -> Tensor:
    """trl's loss of generalized knowledge distillation at beta 0, as its trainer calls it."""
    from trl.experimental.gkd import GKDTrainer

    z_BTV = student(input_ids=ids_BT, use_cache=False).logits
    with torch.no_grad():
        y_BTV = teacher(input_ids=ids_BT, use_cache=False).logits
    return GKDTrainer.generalized_jsd_loss(
        student_logits=z_BTV[:, :-1], teacher_logits=y_BTV[:, :-1], labels=ids_BT[:, 1:], beta=0.0
    )


def liger_kl(student: Any, teacher: Any, ids_BT: Tensor) -> Tensor:
    """Liger's fused head and JSD at beta 0, which it defines as KL: no logits are held."""
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction  # pyright: ignore[reportMissingImports]

    with torch.no_grad():
        y_BTD = teacher.model(input_ids=ids_BT, use_cache=False).last_hidden_state
    stock = student.get_base_model()
    z_BTD = stock.model(input_ids=ids_BT, use_cache=False).last_hidden_state
    z_ND, y_ND = (h_BTD[:, :-1].flatten(0, 1).to(teacher.dtype) for h_BTD in (z_BTD, y_BTD))
    heads = stock.lm_head.weight, teacher.lm_head.weight
    with torch.autocast(ids_BT.device.type, enabled=False):
        return LigerFusedLinearJSDFunction.apply(z_ND, heads[0], y_ND, heads[1], None, 0.0, -100, 1.0)  # type: ignore[return-value]
