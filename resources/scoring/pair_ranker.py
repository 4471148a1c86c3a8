"""PairRM as a scorer: it reads a prompt with two answers, and the place of an answer has an influence."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from resources.common.errors import FinalError
from resources.models.device import prepare_device, torch_dtype
from resources.models.model_source import loading_explained
from resources.scoring.scoring_model import BOTH_ORDERS, Convention, Reading
from resources.settings.machine import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Which token opens what, and under which name the model's config has its id.
MARKS = {"source_prefix_id": "<|source|>", "cand1_prefix_id": "<|candidate1|>", "cand2_prefix_id": "<|candidate2|>"}
# The published model reads 2048 tokens: at most 1224 of the prompt, and each answer gets half of what is left, which is
# 412 or more (https://github.com/yuchenlin/LLM-Blender#load-pairrm-with-hugging-face-from_pretrained).
PROMPT_SHARE = 1224 / 2048
SHORTEST_LENGTH = 32


class PairRanker:
    """A loaded PairRM that gives each of two answers a number; only the difference of the two has a meaning.

    The difference is the logit of the first answer being better: 1 is a probability of 73 %. With `one_order` equal answers
    need not tie, as a pair ranker may prefer a place, so models are never judged by it. With the mean of both orders they
    do, and exchanging the answers exchanges the scores. Their sum is what llm-blender's `compare` gives and what the scores
    of its `rank` differ by
    (https://github.com/yuchenlin/LLM-Blender/blob/main/llm_blender/gpt_eval/utils.py, `max_logits`).
    """

    answers_per_reading: ClassVar[int] = 2
    conventions: ClassVar[Mapping[str, Convention]] = {
        "mean_of_both_orders": Convention(BOTH_ORDERS),
        "sum_of_both_orders": Convention(BOTH_ORDERS, is_sum=True),
        "one_order": Convention(BOTH_ORDERS[:1]),
    }

    def __init__(self, weights: str, engine: Engine, max_length: int) -> None:
        """Loads the model, which reads a prompt and both answers in `max_length` tokens; code that ships with it is never run."""
        from resources.scoring.pairrm import PairRM

        device = prepare_device(engine)
        if max_length < SHORTEST_LENGTH:
            raise FinalError(
                f"scorer.max_length is {max_length}: a pair ranker reads a prompt and two answers in it, so at least "
                f"{SHORTEST_LENGTH} tokens are needed. PairRM was trained with 2048."
            )
        self._max_length = max_length
        self._tokenizer = load_pair_tokenizer(Path(weights))
        model, loaded = PairRM.from_pretrained(
            weights,
            dtype=torch_dtype(engine),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        for fault in ("missing", "unexpected", "mismatched"):
            if keys := sorted(map(str, loaded[f"{fault}_keys"])):
                raise FinalError(
                    f"The weights in {weights} are not those of PairRM: {len(keys)} {fault}, such as {keys[0]}. Name "
                    "llm-blender/PairRM-hf, or a model of exactly its shape, in scorer.name."
                )
        self._model = model.to(device).eval()

    @staticmethod
    def check(directory: Path, trust_remote_code: bool, section: str) -> None:
        """Loads the tokenizer; code that ships with the model is never needed."""
        with loading_explained(directory):
            load_pair_tokenizer(directory)

    def read(self, key: str, prompt: str, answers: Sequence[str]) -> Reading:
        """Lays out a prompt and two answers as PairRM was trained: each opened by its mark, and cut at its end."""
        asked, prompt_cut = self._part("source_prefix_id", prompt, int(self._max_length * PROMPT_SHARE))
        room = (self._max_length - len(asked)) // 2
        parts, cuts, marks = [asked], [], [asked.index(self._mark("source_prefix_id"))]
        for name, answer in zip(("cand1_prefix_id", "cand2_prefix_id"), answers, strict=True):
            part, cut = self._part(name, answer, room)
            # The first of its kind in the part: an answer may quote the mark.
            marks.append(sum(map(len, parts)) + part.index(self._mark(name)))
            parts.append(part)
            cuts.append(cut)
        return Reading(key, [token for part in parts for token in part], marks, prompt_cut, cuts)

    def score(self, readings: Sequence[Reading]) -> list[list[float]]:
        """Scores one batch: the first and the second answer of each reading."""
        import torch

        device = self._model.device
        padded = self._tokenizer.pad(
            {"input_ids": [reading.token_ids for reading in readings]}, padding_side="right", return_tensors="pt"
        ).to(device)
        marks = torch.tensor([reading.marks for reading in readings], device=device)
        with torch.inference_mode():
            return self._model(padded["input_ids"], padded["attention_mask"], marks).tolist()

    def _mark(self, name: str) -> int:
        return self._tokenizer.convert_tokens_to_ids(MARKS[name])

    def _part(self, name: str, text: str, longest: int) -> tuple[list[int], bool]:
        """Token ids of a text with its mark, at most so many, and whether the end is cut off."""
        token_ids = self._tokenizer(MARKS[name] + text).input_ids
        if len(token_ids) <= longest:
            return token_ids, False
        return self._tokenizer(MARKS[name] + text, truncation=True, max_length=longest).input_ids, True


def load_pair_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer of a pair ranker and checks that its marks are those of the model."""
    from transformers import AutoTokenizer

    config = json.loads((directory / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in MARKS.items()}
    wrong = [mark for name, mark in MARKS.items() if config.get(name) != ids[name]]
    if wrong or config.get("model_type") != "deberta-v2":
        raise FinalError(
            f"{directory} holds no PairRM: "
            + (f"{wrong[0]} is not one token with the id that its config states" if wrong else "it is no DeBERTa")
            + ". Name llm-blender/PairRM-hf in scorer.name, or set scorer.kind to `pretrained` for a reward model."
        )
    return tokenizer
