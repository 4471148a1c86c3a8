"""Models of other families than the nano Llama: tiny ones, made from their config classes, with random weights."""

import dataclasses

import pytest
import torch
import transformers

from resources.common.errors import ModelSourceError
from resources.generation.language_model import LanguageModel
from resources.generation.transformers_engine import TransformersEngine
from resources.models.likelihood import AnswerLikelihood
from resources.models.model_source import fetch_initial_policy, refuse_without_classifier
from resources.settings.data import InitialPolicy
from resources.settings.machine import Engine
from resources.settings.method import Sampling
from resources.settings.training import TrainingProcesses
from resources.storage.checkpoint_store import Checkpoint
from resources.training.cpu_sft import only_projects
from resources.training.trainer import Trainer
from tests.nano import nano_tokenizer
from tests.test_engines import requests
from tests.test_scorer import scorer
from tests.test_training import EXAMPLES, PAIRED, ROWS, SFT, SIMPO, pairs

SIZES = {
    # Wider than the tokenizer.
    "vocab_size": 1088, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 1024,
}  # fmt: skip
# By family: what differs from the sizes, and whether the logits are the plain projection of the last hidden states.
FAMILIES = {
    "Llama": ({"eos_token_id": [2, 0]}, True),
    "Qwen2": ({"tie_word_embeddings": True}, True),
    "Qwen3": ({}, True),
    "Phi3": ({}, True),
    "GPTNeoX": ({"num_key_value_heads": 2}, True),
    "GPT2": ({"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 1024}, True),
    "Falcon": ({"num_kv_heads": 1}, True),
    "Gemma2": ({"query_pre_attn_scalar": 16, "final_logit_softcapping": 30.0}, False),
    "Gemma3": ({"query_pre_attn_scalar": 16}, True),
    "Granite": ({"logits_scaling": 8.0}, False),
    "Cohere": ({"logit_scale": 0.0625}, False),
}

WITHOUT_CLASSIFIER = ("Granite", "Cohere")


def tiny(family, **changes):
    name = {"Gemma3": "Gemma3Text"}.get(family, family)
    tokenizer = nano_tokenizer()
    sizes = {key: value for key, value in SIZES.items() if (family, key) != ("Falcon", "head_dim")}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = getattr(transformers, f"{name}Config")(**sizes | ids | changes)
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


def test_a_model_that_keeps_a_state_is_refused_by_name(tmp_path):
    tiny("Mamba", state_size=8).save_pretrained(tmp_path)
    nano_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelSourceError, match=r"is a MambaForCausalLM, which keeps a state .* Choose a transformer"):
        fetch_initial_policy(InitialPolicy(source="directory", name=str(tmp_path)), trust_remote_code=False)


def test_a_model_that_states_no_longest_context_writes(tmp_path):
    tokenizer = nano_tokenizer()
    torch.manual_seed(0)
    config = transformers.BloomConfig(
        vocab_size=1088, hidden_size=32, n_layer=1, n_head=2,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine = TransformersEngine(str(tmp_path), Engine(device="cpu", threads=1, dtype="float32"))
    (written,) = engine.generate(requests([3, 5]), Sampling(max_new_tokens=4))
    assert len(written) == 2


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_goes_through_all_that_an_iteration_does(tmp_path, family):
    tiny(family, **FAMILIES[family][0]).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    nano_tokenizer().save_pretrained(tmp_path / "model")
    place, engine = str(tmp_path / "model"), Engine(threads=1, dtype="float32")
    model = Checkpoint("initial_policy", None, family, place, place)
    trainer = Trainer(engine=engine, random_seed=1, processes=TrainingProcesses(), states=str(tmp_path / "states"))
    language_model = LanguageModel(shards=str(tmp_path / "shards"), engine=engine, random_seed=1)
    prompts = [(str(number), asked) for number, (asked, _) in enumerate(EXAMPLES)]
    sampling = Sampling(temperature=0.7, top_k=20, max_new_tokens=8)

    together, _ = language_model.answer(model, prompts, sampling)
    elsewhere = language_model.model_copy(update={"shards": str(tmp_path / "alone")})
    alone = [elsewhere.answer(model, [prompt], sampling)[0]["text"][0] for prompt in prompts[:2]]
    assert together["text"].to_list()[:2] == alone

    half = SFT.model_copy(update={"lora": SFT.lora.model_copy(update={"last_layers": 1})})
    assert trainer.train("supervised", model, EXAMPLES, half, tmp_path / "sft").steps == 2
    assert trainer.train("preference", model, pairs(), PAIRED, tmp_path / "policy", SIMPO).steps == 2
    policy = dataclasses.replace(model, sha="policy", weights=str(tmp_path / "policy" / "merged"))
    read = AnswerLikelihood(engine=engine).measure(policy, [(row["prompt"], row["answer"]) for row in ROWS[:2]])
    assert all(value < 0 for value in read.per_token)

    if family in WITHOUT_CLASSIFIER:
        with pytest.raises(ModelSourceError, match=r"no sequence classifier for .* set scorer.kind to `pretrained`"):
            refuse_without_classifier(tmp_path / "model", "scorer")
        return
    refuse_without_classifier(tmp_path / "model", "scorer")
    worse = [(row["prompt"], row["answer"], "I do not know that.") for row in ROWS]
    trainer.train("reward", model, worse, SFT, tmp_path / "reward")
    reward = Checkpoint("reward_model", None, "reward", str(tmp_path / "reward" / "merged"), str(tmp_path / "reward"))
    all_margins, one_margin = (
        scorer(tmp_path / name, dtype="float32").compare(reward, rows).margins
        for name, rows in (("all", worse), ("one", worse[:1]))
    )
    assert all_margins[0] == pytest.approx(one_margin[0], abs=1e-4)
