"""Which settings of the preference optimisation are searched, and how."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from resources.settings.sections import Section, flattened

# Of a grid; and as many are looked at before a run that searches in turn.
MOST_COMBINATIONS = 1_000


class Search(Section):
    """Besides what this table names, lists of values of settings: `{loss.beta: [2, 4], learning_rate: [3.0e-7, 1.0e-6]}`."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Any]

    how: Literal["grid", "in_turn"] = Field(
        "grid",
        description="`grid`: all combinations. `in_turn`: one setting after the other, each with the best values so far. Both take "
        "the learning rate first, then the loss, then all else: SimPO's authors call the learning rate the most critical.",
    )
    metric: Literal["length_controlled", "win_rate", "instructions"] = Field(
        "length_controlled",
        description="What the best candidate is best at, always on the dev split: the win rate over M_0 by the independent judge, "
        "`length_controlled`, which takes answers alike in length, or as it is (`win_rate`), or `instructions`, the verifiable "
        "instructions followed less M_0's.",
    )
    when: Literal["each_iteration", "first"] = Field(
        "each_iteration",
        description="Search in `each_iteration`, or in the `first` alone, whose choice the later ones take.",
    )
    max_candidates: int | None = Field(None, ge=1, description="Candidates that are trained at most. None: all.")
    max_minutes: float | None = Field(
        None,
        gt=0,
        description="Minutes that a search takes at most: no candidate is begun that would not end in them, by the time of those "
        "before it. The first one always is. None: no limit.",
    )
    parallel: int | None = Field(
        None,
        ge=1,
        description="Candidates that train side by side, each in a process of its own and on a GPU of its own. None: as many as "
        "there are GPUs; one where training_processes spreads a training over several.",
    )

    @model_validator(mode="before")
    @classmethod
    def _named_in_one_way(cls, values: Any) -> Any:
        """`loss: {beta: [2]}` is `loss.beta: [2]`, and `training.epochs` is `epochs`."""
        if not isinstance(values, dict):
            return values
        return {name.removeprefix("training."): value for name, value in flattened(values)}

    @property
    def space(self) -> dict[str, list[Any]]:
        """The values of each setting by name, in the order in which the settings are tried."""
        values = self.__pydantic_extra__
        return dict(sorted(values.items(), key=lambda item: (item[0] != "learning_rate", item[0][:5] != "loss.")))

    @property
    def turns(self) -> list[dict[str, list[Any]]]:
        """What is tried together: all settings, or one at a time."""
        return [self.space] if self.how == "grid" else [{name: values} for name, values in self.space.items()]

    @property
    def planned(self) -> int:
        """How many candidates the lists make."""
        return sum(math.prod(map(len, turn.values())) for turn in self.turns)

    @property
    def candidates(self) -> int:
        """How many of them are trained at most."""
        return min(self.planned, self.max_candidates or self.planned)

    @property
    def possible(self) -> Iterator[dict[str, Any]]:
        """Combinations of values that may be tried, no more than can be looked at before a run."""
        names = list(self.space)
        begun = [names] if self.how == "grid" else [names[: place + 1] for place in range(len(names))]
        for each in begun:
            spaces = {name: self.space[name] for name in each}
            yield from itertools.islice(combinations(spaces), MOST_COMBINATIONS)


def combinations(space: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """All combinations of values, those of the first setting in quickest succession.

    Examples:
        >>> [tuple(each.values()) for each in combinations({"learning_rate": [1, 2], "loss.beta": [3, 4]})]
        [(1, 3), (2, 3), (1, 4), (2, 4)]
    """
    names = list(space)
    for values in itertools.product(*(space[name] for name in reversed(names))):
        yield dict(zip(names, reversed(values), strict=True))


def tried_text(tried: Mapping[str, Any]) -> str:
    """Values that were tried, as people read them: `learning_rate 1e-06, loss.beta 4.0`."""
    return ", ".join(f"{name} {value}" for name, value in tried.items())
