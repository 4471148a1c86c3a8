"""What a stage costs, as upper bounds: every completion is taken to be as long as allowed."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Literal

from resources.settings.settings import Settings
from resources.settings.training import Training

Kind = Literal["generate", "train", "score"]


@dataclasses.dataclass(frozen=True)
class Work:
    """What one stage has to do in one iteration, in tokens that are written, trained on or scored.

    `later_only`: iteration 1 does without it, because its rows are found in finished shards. `first_only`: only iteration 1
    does it. `accumulates`: iteration t has t times as much of it, the pairs of all iterations so far, but never more than
    `most_tokens`.
    """

    kind: Kind
    tokens: float
    later_only: bool = False
    first_only: bool = False
    accumulates: bool = False
    most_tokens: float = float("inf")

    def in_iteration(self, iteration: int) -> float:
        """The tokens of an iteration, counted from 1."""
        if self.later_only if iteration == 1 else self.first_only:
            return 0.0
        return min(self.tokens * (iteration if self.accumulates else 1), self.most_tokens)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many rows there are and how long they are, in tokens; a prompt counts with its chat template.

    `train`, `judge`, `scorer`, `held_out` (dev and test) and `instructions` count rows. `asked` and `gold` are the lengths of a
    prompt and a gold answer, the last two those of the templates, without question and answer.
    """

    settings: Settings
    train: int
    judge: int
    scorer: int
    held_out: int
    instructions: int
    asked: float
    gold: float
    generator_instruction: float
    improver_instruction: float

    @property
    def prompts(self) -> int:
        """Synthetic prompts of one iteration."""
        return self.settings.prompt_generator.prompts_per_iteration

    @property
    def judged(self) -> int:
        """One answer of a model that is evaluated."""
        return self.settings.evaluation.sampling.max_new_tokens

    @property
    def held_out_answers(self) -> int:
        """Answers of one model to the held-out prompts."""
        return self.held_out * self.settings.evaluation.samples

    @property
    def written(self) -> int:
        """One answer of a policy."""
        return self.settings.responses.sampling.max_new_tokens


Cost = Callable[[Sizes], Iterable[Work]]


def training_work(training: Training, rows: int, length: float, accumulates: bool = False) -> Work:
    """The work of a training run on so many rows of some length."""
    most = (training.max_examples or float("inf")) * training.epochs * length
    return Work("train", rows * training.epochs * length, accumulates=accumulates, most_tokens=most)
