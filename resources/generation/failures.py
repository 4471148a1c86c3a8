"""What a server's refusal of a few prompts leaves: all other rows."""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

from resources.common.errors import FinalError

# The longest prompts come first, and may be too long for a server that answers all others.
SPARE = 16


class RefusedError(FinalError):
    """A server does not answer this prompt; others it may answer."""

    def __init__(self, message: str, reason: str, may_pass: bool = False) -> None:
        """Takes the whole sentence, what the server said, and whether that is what passes with most prompts."""
        super().__init__(message)
        self.reason, self.may_pass = reason, may_pass


class UnansweredError(RuntimeError):
    """A server did not answer in all tries, which may pass."""

    def __init__(self, message: str, reason: str, may_be_the_prompt: bool) -> None:
        super().__init__(message)
        self.reason, self.may_be_the_prompt = reason, may_be_the_prompt


class Outcome(Protocol):
    """What became of a prompt."""

    @property
    def refusal(self) -> RefusedError | None:
        """Why there is no answer."""


Asked = TypeVar("Asked", bound=Outcome)


def few_refused(batches: Iterable[list[Asked]], answered: int) -> Iterator[list[Asked]]:
    """Passes batches on, until half of all prompts are refused, those included that were answered earlier.

    Raises:
        FinalError: So many are.
        RuntimeError: More than a few have no answer for a reason that may pass: it is the server that is not well.
    """
    refused: list[RefusedError] = []

    def stop_at(most: int) -> None:
        lasting = [refusal for refusal in refused if not refusal.may_pass]
        if not refused or (len(refused) < most and len(refused) - len(lasting) <= SPARE):
            return
        said = f"{len(refused)} of {len(refused) + answered} prompts have no answer. {refused[0].description}"
        raise FinalError(said) if len(lasting) >= most else RuntimeError(said)

    for batch in batches:
        yield batch
        refused += [each.refusal for each in batch if each.refusal]
        answered += sum(each.refusal is None for each in batch)
        stop_at(answered + SPARE)
    stop_at(answered)
