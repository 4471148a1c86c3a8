"""A reward model: a sequence classifier with one output, which reads one answer at a time."""

from collections.abc import Sequence

from resources.common.errors import FinalError
from resources.models.chat import answer_ids, load_tokenizer, prompt_ids
from resources.models.device import prepare_device, torch_dtype
from resources.scoring.scoring_model import Reading
from resources.settings.machine import Engine


class RewardModel:
    """A loaded sequence classifier that gives a (prompt, answer) one number."""

    def __init__(self, weights: str, engine: Engine, max_length: int) -> None:
        """Loads the model.

        Args:
            weights: Directory with safetensors weights, config, tokenizer and chat template.
            engine: Device, number format, and whether code that ships with the model may run.
            max_length: Longest prompt and answer together, in tokens.

        Raises:
            FinalError: It is no classifier.
        """
        from transformers import AutoModelForSequenceClassification

        device = prepare_device(engine)
        self._weights = weights
        self._max_length = max_length
        self._tokenizer = load_tokenizer(weights, engine.trust_remote_code)
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            weights,
            dtype=torch_dtype(engine),
            use_safetensors=True,
            trust_remote_code=engine.trust_remote_code,
            output_loading_info=True,
        )
        if missing := sorted(loaded["missing_keys"]):
            # They would be drawn at random, and so would the scores.
            raise FinalError(
                f"The model {weights} has no weights for {', '.join(missing[:3])}, so it is no reward model: name a sequence "
                "classifier in scorer.name."
            )
        if model.config.pad_token_id is None:
            # Without it a classifier cannot tell where the shorter rows of a batch end.
            model.config.pad_token_id = self._tokenizer.pad_token_id
        self._model = model.to(device).eval()

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
        """Scores one batch.

        Raises:
            FinalError: The model gives more than one number per answer.
        """
        import torch

        padded = self._tokenizer.pad(
            {"input_ids": [reading.token_ids for reading in readings]}, padding_side="right", return_tensors="pt"
        ).to(self._model.device)
        with torch.inference_mode():
            logits = self._model(**padded).logits
        if logits.numel() != len(readings):
            raise FinalError(
                f"The reward model {self._weights} gives {logits.numel() // len(readings)} numbers per answer: choose one "
                "with a single output in scorer.name."
            )
        return [[logit] for logit in logits.flatten().tolist()]
