"""A real but tiny instruct model, made here in seconds, and settings that run the whole pipeline on it."""

import array
import functools
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import polars as pl
import yaml

from resources.models.chat import answer_ids, load_tokenizer, prompt_ids
from resources.settings.files import PRESETS, home_directory, home_settings
from resources.settings.settings import Settings
from synpo_assets.method.templates import generator_instruction, generator_target, user_message

SEED = PRESETS.parent / "seed"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEACHING_STEPS = 400
EMBEDDING_MODEL = "nano-embedding"


@functools.cache
def active_settings() -> Settings:
    """Those of the home that SYNPO_HOME names."""
    return home_settings(home_directory())


def seed_rows(name: str = "train") -> list[dict[str, str]]:
    return [json.loads(line) for line in (SEED / f"{name}.jsonl").read_text().splitlines()]


def nano_tokenizer(more: list[dict[str, str]] | None = None) -> Any:
    """A byte-level BPE of 1,024 tokens, trained on the seed text and on more rows, with the ChatML template."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    texts = [f"{row['prompt']} {row['answer']}" for row in seed_rows() + (more or [])]
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(texts, vocab_size=1016, special_tokens=specials, show_progress=False)
    bpe.add_tokens(["OUTPUT", "<question>", "</question>", "<solution>", "</solution>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


def make_nano_model(directory: Path, rows: list[dict[str, str]] | None = None) -> Path:
    """A 2-layer Llama that has seen enough chats to open and close questions and answers; its text is nonsense.

    Args:
        directory: Where it is saved.
        rows: The prompts and answers that it is taught; by default those of the shipped seed.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = nano_tokenizer(rows)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=1024,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True,
        )
    )  # fmt: skip
    # Short answers, which are seen whole and ended.
    rows = sorted(rows or seed_rows(), key=lambda row: len(tokenizer(row["answer"]).input_ids))[:64]
    chats = [
        (generator_instruction(["alpha", "beta", "gamma"]), generator_target(r["prompt"], r["answer"])) for r in rows
    ]
    chats += [(user_message(row["prompt"]), row["answer"]) for row in rows]
    # Of a question with its answer the start is enough, and short rows are learned quickly.
    texts = [(prompt_ids(tokenizer, asked), answer_ids(tokenizer, asked, answer)[:48]) for asked, answer in chats]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.05, TEACHING_STEPS)
    for step in range(TEACHING_STEPS):
        batch = [texts[(step * 8 + place) % len(texts)] for place in range(8)]
        longest = max(len(prompt) + len(answer) for prompt, answer in batch)
        padded = torch.full((8, longest), tokenizer.pad_token_id)
        labels = torch.full((8, longest), -100)
        for row, (prompt, answer) in enumerate(batch):
            whole = torch.tensor(prompt + answer)
            padded[row, : len(whole)] = whole
            labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
        model(input_ids=padded, labels=labels, attention_mask=(padded != tokenizer.pad_token_id).long()).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_nano_embedding_model(directory: Path) -> Path:
    """A 1-layer BERT with random weights."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    tokenizer = nano_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    BertModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def copy_that_adds_bos(model: Path, directory: Path) -> Path:
    """A copy of the nano model whose template writes a BOS, and whose tokenizer would add another."""
    from tokenizers.processors import TemplateProcessing

    shutil.copytree(model, directory)
    tokenizer = load_tokenizer(str(directory))
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.save_pretrained(directory)
    return directory


def prompt_table(prompts: Iterable[tuple[int, list[int]]]) -> tuple[pl.DataFrame, IO[bytes]]:
    """What `Requests` takes, of pairs of key and token ids."""
    pairs, token_ids = list(prompts), tempfile.TemporaryFile()  # noqa: SIM115
    lengths = pl.Series([len(tokens) for _, tokens in pairs], dtype=pl.Int64)
    sizes = pl.Series([token_ids.write(array.array("i", tokens)) for _, tokens in pairs], dtype=pl.Int64)
    token_ids.flush()
    keys = pl.Series([key for key, _ in pairs], dtype=pl.UInt64)
    return pl.DataFrame({"key": keys, "start": sizes.cum_sum() - sizes, "length": lengths}), token_ids


def nano_settings(model: Path) -> dict[str, Any]:
    """Everything small: each stage takes a second or two."""
    training = {
        "learning_rate": 1e-3, "epochs": 1, "batch_size": 4, "micro_batch_size": 4, "max_length": 400,
        "lora": {"rank": 4, "alpha": 8}, "max_examples": 16,
    }  # fmt: skip
    sampling = {"temperature": 0.7, "top_k": 50, "max_new_tokens": 96}
    return {
        "preset": "laptop",
        "initial_policy": {
            "source": "directory", "name": str(model), "system_prompt": None, "wheel_sha256": None, "wheel_member": None,
        },
        "seed_data": {"train_limit": 24, "judge_limit": 8, "held_out_limit": 6},
        "prompt_generator": {
            "prompts_per_iteration": 10, "max_overdraw": 4, "min_words": 2, "language": None,
            "near_duplicate_similarity": 0.95, "training": training, "sampling": sampling,
        },
        "diversity": {
            "clusters": 4, "self_instruct_shots": 3, "self_instruct_sampling": sampling | {"max_new_tokens": 32},
            "embedding_model": {"source": "directory", "name": str(Path(model).parent / EMBEDDING_MODEL)},
        },
        "responses": {"sampling": sampling | {"max_new_tokens": 64}},
        "response_improver": {"margin_threshold": -100, "training": training, "sampling": sampling},
        "scorer": {"training": training},
        "preferences": {"margin_threshold": -100, "max_repetition": 1.0, "pairs_per_iteration": 8},
        "preference_optimization": {
            "training": training | {"max_prompt_length": 300, "max_completion_length": 60}, "loss": {"beta": 2.0},
        },
        # Its win rates are noise.
        "gate": {"minimum": {}},
        # Whatever the CPU can do: answers do not depend on their batch in float32 alone.
        "engine": {"threads": 1, "shard_rows": 4, "dtype": "float32"},
    }  # fmt: skip


def write_settings(path: Path, settings: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path
