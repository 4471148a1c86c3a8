"""Writing a model as one GGUF file, which llama.cpp and Ollama read."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from resources.models.weights import weight_files
from resources.settings.sections import SettingsError

# The family whose tensors are written here, by its name in config.json, which is GGUF's too.
FAMILY = "llama"
CONVERTER = "Convert {} with convert_hf_to_gguf.py of llama.cpp."
# How llama.cpp cuts a text before it merges bytes, by what tokenizer.json holds.
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
CUTS: dict[str, Any] = {
    "gpt-2": [BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES],
}


def write_gguf(directory: Path, target: Path) -> None:
    """Writes a model with its tokenizer and chat template: matrices in bfloat16 unless stored in float32, the rest in float32.

    Raises:
        SettingsError: Its family or its tokenizer is not one of those that are written.
    """
    import gguf

    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    family = config["model_type"]
    scaling = (config.get("rope_parameters") or {}).get("rope_type", "default")
    if family != FAMILY or scaling != "default":
        raise SettingsError(
            f"The model in {directory} is of the family {family} with positions of the kind {scaling}, and only "
            f"{FAMILY} with those of the kind default is written as GGUF. {CONVERTER.format(directory)}"
        )
    writer = gguf.GGUFWriter(target, FAMILY)
    try:
        _describe(writer, config)
        _add_tokenizer(writer, directory, config["vocab_size"])
        for name, values, kind in _tensors(directory, config):
            writer.add_tensor(name, values, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _describe(writer: Any, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    size = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(writer: Any, directory: Path, size: int) -> None:
    import gguf

    from resources.models.chat import load_tokenizer

    written = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    cut = written.get("pre_tokenizer") or {}
    cuts = cut["pretokenizers"] if cut.get("type") == "Sequence" else [cut]
    known = [name for name, each in CUTS.items() if each == cuts]
    if written["model"]["type"] != "BPE" or written.get("normalizer") or not known:
        raise SettingsError(
            f"The tokenizer in {directory} cuts texts in a way that is not written as GGUF. {CONVERTER.format(directory)}"
        )
    tokenizer = load_tokenizer(str(directory))
    added = {index: token.special for index, token in tokenizer.added_tokens_decoder.items()}
    types = gguf.TokenType
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(known[0])
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(size)])
    kinds = {True: types.CONTROL, False: types.USER_DEFINED, None: types.NORMAL}
    writer.add_token_types([kinds[added.get(index)] if index in tokens else types.UNUSED for index in range(size)])
    merges = written["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for name in ("bos", "eos", "pad", "unk"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    # The chat template writes it where the model wants one.
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _tensors(directory: Path, config: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The name in GGUF, the values and the number format of each tensor."""
    import gguf
    import torch
    from safetensors import safe_open

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    kinds = gguf.GGMLQuantizationType
    heads = config["num_attention_heads"]
    permuted = {"q_proj": heads, "k_proj": config.get("num_key_value_heads") or heads}
    for file in weight_files(directory):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                if name == "lm_head.weight" and config.get("tie_word_embeddings"):
                    continue
                tensor = weights.get_tensor(name)
                for part in set(name.split(".")) & permuted.keys():
                    # llama.cpp turns neighbouring numbers by a position, transformers those of both halves.
                    halves = tensor.view(permuted[part], 2, -1, *tensor.shape[1:])
                    tensor = halves.transpose(1, 2).reshape(tensor.shape)
                kept = tensor.ndim == 1 or tensor.dtype == torch.float32
                kind = kinds.F32 if kept else kinds.BF16
                yield (
                    names.get_name(name, try_suffixes=(".weight", ".bias")) or name,
                    gguf.quants.quantize(tensor.float().contiguous().numpy(), kind),
                    kind,
                )
