"""The settings reference says what the code says."""

from typing import Literal

from pydantic import BaseModel, Field

from resources.settings.reference import REFERENCE, reference
from resources.settings.settings import Settings


def test_the_reference_is_what_the_code_says():
    assert REFERENCE.read_text(encoding="utf-8") == reference(Settings), (
        "resources/settings/reference.md is older than the settings: run `python -m resources.settings.reference`."
    )


class Simple(BaseModel):
    """One number."""

    kind: Literal["simple"] = "simple"
    beta: float = Field(1.6, description="A | B.")


class Double(BaseModel):
    """Two numbers.

    Of both.
    """

    kind: Literal["double"]
    order: Literal["up", "down"] = Field("up", description="Which way.")


class Both(BaseModel):
    """All."""

    loss: Simple | Double = Field(Simple(beta=2), discriminator="kind", description="The loss.")
    other: list[Simple] | None = Field(None, description="More.")


def test_each_variant_of_a_union_has_a_table_and_equal_sections_share_one():
    text = reference(Both)
    assert "| `loss` | `{beta: 2.0}` | The loss. |\n| `other` | `null` | More. |" in text
    assert "## `loss` of kind `simple`, `other` of kind `simple`\n\nOne number.\n" in text
    assert "| `beta` | `1.6` | A \\| B. |" in text
    assert "## `loss` of kind `double`\n\nTwo numbers.\n\nOf both.\n\n| setting" in text
    assert "| `kind` | required | Choices: `double`. |" in text
    assert "| `order` | `up` | Which way. Choices: `up`, `down`. |" in text
