"""A model as a GGUF file says what it says as safetensors."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from resources.models.chat import load_tokenizer
from resources.models.gguf_file import write_gguf
from resources.models.wheel_source import _convert_gguf
from resources.settings.sections import SettingsError


def logits(directory, ids):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(input_ids=ids).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_read_back_from_gguf_is_the_same(nano_model, tmp_path, dtype):
    stored = tmp_path / "stored"
    AutoModelForCausalLM.from_pretrained(nano_model, dtype=dtype).save_pretrained(stored)
    before = load_tokenizer(str(nano_model))
    before.save_pretrained(stored)
    write_gguf(stored, tmp_path / "model.gguf")
    _convert_gguf(tmp_path / "model.gguf", tmp_path / "back")
    after = load_tokenizer(str(tmp_path / "back"))
    text = "<|im_start|>user\nWhy is the sky blue? 42 Ünï<|im_end|>\n<question>"
    assert after(text).input_ids == before(text).input_ids
    assert (after.chat_template, after.eos_token, after.pad_token) == (
        before.chat_template,
        before.eos_token,
        before.pad_token,
    )
    ids = torch.tensor([before(text).input_ids])
    # What is read from GGUF is kept in bfloat16.
    rounded = tmp_path / "rounded"
    AutoModelForCausalLM.from_pretrained(nano_model, dtype=torch.bfloat16).save_pretrained(rounded)
    torch.testing.assert_close(logits(tmp_path / "back", ids), logits(rounded, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("file", "changed", "words"), [
    ("config.json", {"model_type": "falcon"}, "of the family falcon"),
    ("config.json", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "positions of the kind yarn"),
    ("tokenizer.json", {"pre_tokenizer": {"type": "Metaspace"}}, "convert_hf_to_gguf.py of llama.cpp"),
])  # fmt: skip
def test_what_is_not_written_as_gguf_is_said(nano_model, tmp_path, file, changed, words):
    other = shutil.copytree(nano_model, tmp_path / "other")
    values = json.loads((other / file).read_text()) | changed
    (other / file).write_text(json.dumps(values))
    with pytest.raises(SettingsError, match=words):
        write_gguf(other, tmp_path / "model.gguf")
