"""What the machine costs, and how much of it an experiment may use."""

import dataclasses
import re
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from resources.common.text import duration
from resources.settings.sections import Section

AMOUNT = re.compile(r"(?P<before>[^\d\s.,+-]*)\s*(?P<number>[+-]?\d+(\.\d+)?)\s*(?P<after>[^\d\s.,+-]*)")
HOURS = ("h", "hour", "hours")


@dataclasses.dataclass(frozen=True)
class Amount:
    """A number of hours, or of a currency as its user writes it: its unit, and whether that stands before the number."""

    number: float
    unit: str
    leads: bool = False

    def __str__(self) -> str:
        """The amount of money as its user writes it."""
        digits = f"{self.number:,.2f}"
        return f"{self.unit}{digits}" if self.leads else f"{digits} {self.unit}"


def amount(text: str, example: str) -> Amount:
    """Reads an amount.

    Examples:
        >>> str(amount("$2.5", "")), str(amount("1200 EUR", "")), amount("12 h", "").number
        ('$2.50', '1,200.00 EUR', 12.0)

    Raises:
        ValueError: It is none, or not above zero.
    """
    found = AMOUNT.fullmatch(text.strip())
    if found is None or bool(found["before"]) == bool(found["after"]):
        raise ValueError(f"{text!r} is not a number with one unit: write it as {example}.")
    if float(found["number"]) <= 0:
        raise ValueError(f"{text!r} is not above zero: write it as {example}, or leave it out.")
    return Amount(float(found["number"]), found["before"] or found["after"], bool(found["before"]))


class Cost(Section):
    """What an hour of the machine costs, and when to stop."""

    per_hour: str | None = Field(
        None,
        description="Money for an hour of the machine, with a currency sign or code of your choice: `2.50 EUR` or `$2.50`. `synpo "
        "check`, assets, report and cards then show money beside time. None: time alone.",
    )
    stop_after: str | None = Field(
        None,
        description="Hours (`12 h`) or money (`30 EUR`) that this home may use, all its runs together. A step at work is finished, "
        "and no other begins. None: no limit.",
    )

    @field_validator("per_hour", "stop_after", mode="before")
    @classmethod
    def _as_text(cls, stated: Any) -> Any:
        return str(stated) if isinstance(stated, int | float) and not isinstance(stated, bool) else stated

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        rate = amount(self.per_hour, "`2.50 EUR` or `$2.50`") if self.per_hour is not None else None
        budget = amount(self.stop_after, "`12 h` or `30 EUR`") if self.stop_after is not None else None
        if rate and rate.unit in HOURS:
            raise ValueError(f"per_hour is {self.per_hour!r}, which is no money: write it as `2.50 EUR` or `$2.50`.")
        if budget and budget.unit not in HOURS:
            if rate is None:
                raise ValueError(
                    f"stop_after is {self.stop_after!r} and cost.per_hour is not stated, so nobody knows when that is spent: state "
                    "cost.per_hour, or write stop_after in hours, as `12 h`."
                )
            if rate.unit != budget.unit:
                raise ValueError(
                    f"stop_after is in {budget.unit} and per_hour in {rate.unit}: state both in one currency, or stop_after in "
                    "hours, as `12 h`."
                )
        return self

    def money(self, seconds: float) -> str | None:
        """What so much time costs; None if the rate is not stated."""
        if self.per_hour is None:
            return None
        rate = amount(self.per_hour, "")
        return str(dataclasses.replace(rate, number=rate.number * seconds / 3600))

    def text(self, seconds: float) -> str:
        """A time, with its money where the rate is stated."""
        money = self.money(seconds)
        return duration(seconds) + (f", {money}" if money else "")

    @property
    def budget_seconds(self) -> float | None:
        """The time after which no further step begins; None if there is no limit."""
        if self.stop_after is None:
            return None
        budget = amount(self.stop_after, "")
        if budget.unit in HOURS or self.per_hour is None:
            return 3600 * budget.number
        return 3600 * budget.number / amount(self.per_hour, "").number
