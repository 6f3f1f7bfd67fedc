"""Laws of the architecture table: each row names what the stock model of that type really has."""

from __future__ import annotations

import re

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from peft import LoraConfig, get_peft_model
from tiny import COMMON, FAMILIES, ids, tiny
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    OpenAIGPTConfig,
)
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

from recover.base.errors import ModelError
from recover.cli import app
from recover.config import recipe
from recover.models.arch import (
    ALL_HEADS,
    ARCHS,
    arch_of,
    arch_of_config,
    as_linears,
    blocks_of,
    final_norm_of,
    head_of,
    linears_of,
)
from recover.models.load import describe, load_model
from recover.models.refusal import KINDS, WRAPPER
from recover.models.wrapper import WRAPPERS


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_names_every_part(family):
    """Every linear layer of a block is listed once; head(norm(last block)) with scale and softcap gives the logits."""
    model = tiny(family)
    arch, blocks = arch_of(model), blocks_of(model)
    assert arch is ARCHS[FAMILIES[family][0]] is arch_of(model.config) and len(blocks) == 6
    linears = linears_of(model)
    inside = {name for name, m in model.named_modules() if type(m) in (nn.Linear, Conv1D) and name != arch.head}
    inside -= {name for name in inside if name.endswith("shared_expert_gate")}  # one row: a weight a token, as a router
    assert set(linears) == inside and all(linears[name] is model.get_submodule(name) for name in inside)
    assert model.get_submodule(arch.embed) is model.get_input_embeddings()

    captured = []
    hook = blocks[-1].register_forward_hook(lambda module, inputs, output: captured.append(output))
    logits = model(ids()).logits
    hook.remove()
    weight, bias, scale, softcap = head_of(model)
    h = captured[0][0] if isinstance(captured[0], tuple) else captured[0]  # Granite in transformers 5.3
    z = scale * nn.functional.linear(final_norm_of(model)(h), weight, bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    assert torch.allclose(z, logits, rtol=1e-6, atol=1e-6)


def test_the_parts_are_found_through_a_peft_model():
    model = tiny("phi3")
    before = linears_of(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["qkv_proj"]))
    assert linears_of(wrapped) == before, "names are the stock model's, modules the base layers"
    assert blocks_of(wrapped) is blocks_of(model) and arch_of(wrapped) is ARCHS["phi3"]
    assert head_of(wrapped)[0] is model.lm_head.weight


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "zzz"}, r"'zzz' is not supported; supported: llama.*add this row.*Arch\('zzz'\)"),
        (
            {"model_type": "internvl", "text_config": {"model_type": "qwen3"}},
            r"a text model inside a wrapper.*, of type 'qwen3'.*save the text model alone and prune that:",
        ),
        (
            {"model_type": "llama4", "text_config": {"model_type": "llama4_text"}},
            r"of type 'llama4_text', which is not supported either.*`recover families` says",
        ),
        ({"model_type": "qwen2_moe", "num_experts": 60}, "it is a mixture of experts of another kind; its router"),
        ({"model_type": "granitemoe", "num_local_experts": 32}, "it is a mixture of experts"),
        ({"model_type": "olmo_hybrid", "layer_types": ["linear_attention", "full_attention"]}, "it is a hybrid"),
        ({"model_type": "new", "mamba_d_state": 16}, "it is a hybrid"),
        ({"model_type": "zamba2", "mamba_d_state": 16}, "it is a hybrid of another kind.*none of them was tried"),
        ({"model_type": "gemma3n", "text_config": {}}, "embeddings for each block"),
    ],
)
def test_what_is_not_supported_says_what_it_is_and_what_to_do(config, said):
    with pytest.raises(ModelError, match=f"^model type '{config['model_type']}' is not supported.*") as caught:
        arch_of_config(config)
    assert re.search(said, str(caught.value)) and "\n" not in str(caught.value)
    if config["model_type"] != "zzz":
        assert "add this row" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "granitemoehybrid", "num_local_experts": 8}, "its dense models are supported"),
        ({"model_type": "gemma4_text", "num_kv_shared_layers": 10}, "blocks that share keys and values"),
        ({"model_type": "gemma4_text", "hidden_size_per_layer_input": 256}, "embeddings for each block"),
        ({"model_type": "gemma4_text", "enable_moe_block": True}, "a mixture of experts beside each MLP"),
        (
            {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
            "divides its attention by its number",
        ),
        ({"model_type": "gpt_bigcode", "add_cross_attention": True}, "its blocks attend to an encoder too"),
    ],
)
def test_models_of_a_supported_type_that_are_otherwise_are_refused(config, said):
    with pytest.raises(ModelError, match=f"this model of type '{config['model_type']}' is not supported.*{said}"):
        arch_of_config(config)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("gemma3n", {}),
        ("gemma3n_text", {}),
        ("gemma4", {"text_config": {"num_kv_shared_layers": 4, "hidden_size_per_layer_input": 32}}),
        ("gemma4_text", {"num_kv_shared_layers": 4}),
    ],
)
def test_a_folder_whose_blocks_share_is_refused_by_what_it_is(model_type, fields, tmp_path):
    """And not by what else is unusual in it: Gemma 3n has a list of sizes, one for each block."""
    AutoConfig.for_model(model_type, **fields).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"embeddings for each block, or blocks that share.*Gemma 4 12B and 31B"):
        describe(recipe.Model(source=str(tmp_path)))


def test_a_model_of_transformers_without_a_row_says_the_same():
    with pytest.raises(ModelError, match="'openai-gpt' is not supported: it is a model whose norms act on"):
        arch_of(OpenAIGPTConfig())


def test_conv1d_layers_whose_weights_are_dealt_out_are_refused_with_the_launch():
    model = tiny("gpt2")
    model.transformer.h[0].mlp.c_fc.weight.ds_id = 0  # as DeepSpeed marks what it has partitioned
    with pytest.raises(ModelError, match=r"ZeRO-3 deals out this model's weights.*launch/zero2.yaml"):
        as_linears(model)


def test_the_text_model_of_a_wrapper_is_saved_alone_as_the_message_says(tmp_path):
    """The lines of the message, on a real wrapper: what is saved is the text model, to the bit."""
    text = {key: value for key, value in COMMON.items() if key not in ("pad_token_id", "tie_word_embeddings")}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    inside = {**text, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
    config = AutoConfig.for_model("gemma3", text_config=inside, vision_config=vision, mm_tokens_per_image=4)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "whole")
    byte_tokenizer().save_pretrained(tmp_path / "whole")
    lines = WRAPPER.instead.partition(": ")[2].replace("SOURCE", repr(str(tmp_path / "whole")))
    known = {each.__name__: each for each in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer)}
    exec(lines.replace("FOLDER", repr(str(tmp_path / "text"))), known)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole")
    saved = load_model(recipe.Model(source=str(tmp_path / "text")))
    assert arch_of(saved).model_type == "gemma3_text"
    assert torch.equal(saved(ids()).logits, whole(ids()).logits)


def test_the_command_says_what_is_supported_and_why_the_rest_is_not():
    said = CliRunner().invoke(app, ["families"], env={"COLUMNS": "200", "TERM": "dumb"}).stdout
    for model_type in ARCHS:
        assert re.search(rf"^ *{model_type} +yes( +(yes|no)){{5}} *$", said, re.MULTILINE), model_type
    assert re.search(r"^ *olmo2 +yes +no +yes +no +no +yes", said, re.MULTILINE) and ALL_HEADS in " ".join(said.split())
    assert re.search(r"^ *olmoe +yes +no +no +no +yes +yes", said, re.MULTILINE)
    assert all(f"- {kind.called}" in said for kind in KINDS)
    assert all(re.search(rf"^ *{wrapper} +\w", said, re.MULTILINE) for wrapper in WRAPPERS)
