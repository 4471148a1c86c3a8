"""The error of a step that would fail in the same way again."""

import dagster as dg


class FinalError(dg.Failure):
    """Something that trying again cannot mend, so the step is not retried; the message says what can mend it."""

    def __init__(self, message: str) -> None:
        super().__init__(message, allow_retries=False)
