"""The baseline that synthetic prompts are compared with: M_0 writes a prompt after seeing a few of the seed.

Self-Instruct (https://arxiv.org/abs/2212.10560) shows a base model eight tasks and has it continue the list. M_0 is an
instruct model, so it is asked. Self-Instruct drops what resembles an earlier task (ROUGE-L above 0.7); here the baseline
passes the filter of the synthetic prompts, so that the comparison is not one of filters.
"""

import random
import re
from collections.abc import Sequence
from typing import Any

LABEL = re.compile(r"^[ \t]*Task \d+:", re.MULTILINE)


def draw_examples(ids: Sequence[str], shots: int, count: int, random_seed: int) -> list[dict[str, Any]]:
    """Draws the seed prompts that are shown, anew for each prompt to write; all of them if there are fewer than `shots`."""
    size = min(shots, len(ids))
    draws = (random.Random(f"{random_seed}:self-instruct:{number}").sample(list(ids), size) for number in range(count))
    return [{"number": number, "example_ids": drawn} for number, drawn in enumerate(draws)]


def parse_task(text: str) -> str | None:
    r"""The first task in what M_0 wrote, or None if there is none.

    Examples:
        >>> parse_task("Task 9: Explain tides.\n\nTask 10: Explain rain.")
        'Explain tides.'
        >>> parse_task("Explain tides.")
        'Explain tides.'
        >>> parse_task(" Task 9: ") is None
        True
    """
    return next((part.strip() for part in LABEL.split(text) if part.strip()), None)
