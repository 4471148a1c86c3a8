"""What every judge takes and gives."""

from collections.abc import Callable, Sequence
from typing import Protocol

from resources.scoring.scorer import Comparison


class Judge(Protocol):
    """Compares two answers to each prompt."""

    @property
    def name(self) -> str:
        """A word that columns and figures are named by: `judge`, `scorer` or `server`."""
        ...

    @property
    def label(self) -> str:
        """The judge as people name it, which says whether it took part in training."""
        ...

    def compare(self, rows: Sequence[tuple[str, str, str]], log: Callable[[str], None]) -> Comparison:
        """Scores two answers to each prompt; where it gives no verdict, both scores are missing.

        Args:
            rows: A prompt and two answers each.
            log: Receives progress sentences.
        """
        ...
