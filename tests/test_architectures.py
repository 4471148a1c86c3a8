"""Models of other families than the nano Llama: tiny ones, made from their config classes, with random weights."""

import pytest
import torch
import transformers

from resources.training.cpu_sft import only_projects

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
# By family: what differs from the sizes, and whether the logits are the plain projection of the last hidden states.
FAMILIES = {
    "Llama": ({}, True),
    "Qwen2": ({}, True),
    "Phi3": ({}, True),
    "GPTNeoX": ({"num_key_value_heads": 2}, True),
    "GPT2": ({"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}, True),
    "Gemma2": ({"query_pre_attn_scalar": 16, "final_logit_softcapping": 30.0}, False),
    "Granite": ({"logits_scaling": 8.0}, False),
    "Cohere": ({"logit_scale": 0.0625}, False),
}


def tiny(family, **changes):
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    torch.manual_seed(0)
    return getattr(transformers, f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_scaled_and_capped_logits_are_noticed(family):
    changes, is_plain = FAMILIES[family]
    model, read = tiny(family, **changes), torch.arange(3, 40)[None]
    model.train()
    assert only_projects(model, read) == is_plain
    assert model.training
    # The hook is gone: the model's logits are its own again.
    model.eval()
    with torch.no_grad():
        assert model(read).logits.abs().max() < 100
