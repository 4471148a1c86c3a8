"""What the scripts share: the device, models to work with, fresh processes, and one JSON line per finding."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resources.storage.checkpoint_store import Checkpoint
from tests.nano import make_nano_model, nano_tokenizer

DEVICE = "cpu" if os.environ.get("KIT_DEVICE") == "cpu" else "cuda"
WORK = Path(os.environ.get("KIT_WORK", "/tmp/kit-work"))
AIM = 0.97
# hidden size, layers, heads, key-value heads, intermediate size: as SmolLM2-135M, about Qwen2.5-1.5B, Mistral-7B.
SHAPES = {
    "nano": (64, 2, 2, 1, 128),
    "135m": (576, 30, 9, 3, 1536),
    "1b": (2048, 24, 32, 8, 5632),
    "7b": (4096, 32, 32, 8, 14336),
}


def say(check: str, /, *, ok: bool, **figures: Any) -> None:
    """Appends a finding to $OUT/findings.jsonl, or prints it where there is no such folder."""
    line = json.dumps({"check": check, "ok": ok} | figures)
    if out := os.environ.get("OUT"):
        with (Path(out) / "findings.jsonl").open("a") as file:
            file.write(line + "\n")
    else:
        print(line, flush=True)  # noqa: T201


def taught() -> Checkpoint:
    """The nano model that the tests teach."""
    folder = WORK / "models" / "taught"
    if not (folder / "tokenizer.json").exists():
        make_nano_model(folder)
    return checkpoint(folder)


def random_model(size: str) -> Path:
    """A Llama of random weights with the nano model's tokenizer: rates depend on shapes, not on what is written."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = WORK / "models" / size
    if (folder / "tokenizer.json").exists():
        return folder
    hidden, layers, heads, key_value_heads, intermediate = SHAPES[size]
    tokenizer = nano_tokenizer()
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(
            LlamaConfig(
                # The vocabulary of a real model: logits are a large part of the memory and of sampling.
                vocab_size=len(tokenizer) if size == "nano" else 49152, hidden_size=hidden,
                intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=key_value_heads, head_dim=hidden // heads, max_position_embeddings=4096,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True,
            )
        )  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(folder)
    # Last: with it the folder is complete.
    tokenizer.save_pretrained(folder)
    return folder


def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint("initial_policy", None, folder.name, str(folder), str(folder))


def in_turns(ways: Sequence[str], rounds: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What the running script prints with `--way`, in fresh processes; the ways take turns, so that all are disturbed alike."""
    taken: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            command = [sys.executable, *sys.argv, f"--way={way}", f"--folder={folder}"]
            result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if not result.returncode:
                # Libraries print too.
                taken[way].append(json.loads([line for line in result.stdout.splitlines() if line[:1] == "{"][-1]))
    return taken
