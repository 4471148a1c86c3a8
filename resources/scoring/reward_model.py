"""A reward model: a sequence classifier with one output, which reads one answer at a time."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from resources.common.errors import FinalError, ModelSourceError
from resources.common.text import one_line
from resources.models.chat import answer_ids, load_tokenizer, prompt_ids
from resources.models.device import loading_options, prepare_device
from resources.models.model_source import check_tokenizer, loading_explained
from resources.scoring.scoring_model import Convention, Reading
from resources.settings.machine import Engine


class RewardModel:
    """A loaded sequence classifier that gives a (prompt, answer) one number, in units of its own; equal answers tie."""

    answers_per_reading: ClassVar[int] = 1
    conventions: ClassVar[Mapping[str, Convention]] = {"reward_difference": Convention((("first",), ("second",)))}

    def __init__(self, weights: str, engine: Engine, max_length: int) -> None:
        """Loads the model, which reads a prompt and an answer in `max_length` tokens."""
        from transformers import AutoModelForSequenceClassification

        from resources.models.classifier import padding_id, read_head

        device = prepare_device(engine)
        self._weights = weights
        self._max_length = max_length
        self._tokenizer = load_tokenizer(weights, engine.trust_remote_code)
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            weights, output_loading_info=True, **loading_options(engine)
        )
        if missing := sorted(loaded["missing_keys"]):
            # They would be drawn at random, and so would the scores.
            raise FinalError(
                f"The model {weights} has no weights for {', '.join(missing[:3])}, so it is no reward model: name a sequence "
                "classifier in scorer.name, or in judge.name for the judge."
            )
        read_head(model, weights)
        self._padding = padding_id(model.config, self._tokenizer)
        self._model = model.to(device).eval()

    @staticmethod
    def check(directory: Path, trust_remote_code: bool, section: str) -> None:
        """Loads the tokenizer, and imports the code that ships with the model if there is any."""
        check_tokenizer(directory, trust_remote_code, section)
        import transformers
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        with loading_explained(directory):
            config = json.loads((directory / "config.json").read_text())
            if any(hasattr(transformers, name) for name in config.get("architectures") or []):
                return
            reference = (config.get("auto_map") or {}).get("AutoModelForSequenceClassification")
        if reference is None:
            raise ModelSourceError(f"The model in {directory} is no sequence classifier: check {section}.name.")
        try:
            get_class_from_dynamic_module(reference, str(directory))
        # It is somebody else's code: it may fail in any way.
        except Exception as error:
            reason = one_line(str(error), 200)
            raise ModelSourceError(
                f"The code that ships with the model in {directory} does not run with transformers {transformers.__version__}: "
                f"{reason} Name a directory with a corrected copy of the model in {section}.name."
            ) from None

    def read(self, key: str, prompt: str, answers: Sequence[str]) -> Reading:
        """Renders a prompt and its one answer with the chat template; the end of what is too long is cut off."""
        (answer,) = answers
        user = [{"role": "user", "content": prompt}]
        asked = prompt_ids(self._tokenizer, user)
        token_ids = asked + answer_ids(self._tokenizer, user, answer)
        return Reading(
            key=key,
            token_ids=token_ids[: self._max_length],
            marks=[],
            prompt_cut=len(asked) > self._max_length,
            answers_cut=[len(token_ids) > self._max_length],
        )

    def score(self, readings: Sequence[Reading]) -> list[list[float]]:
        """Scores one batch."""
        import torch

        from resources.models.classifier import padded

        batch = padded([reading.token_ids for reading in readings], self._padding)
        with torch.inference_mode():
            logits = self._model(**{name: part.to(self._model.device) for name, part in batch.items()}).logits
        if logits.numel() != len(readings):
            raise FinalError(
                f"The reward model {self._weights} gives {logits.numel() // len(readings)} numbers per answer: choose one "
                "with a single output in scorer.name, or in judge.name for the judge."
            )
        return [[logit] for logit in logits.flatten().tolist()]
