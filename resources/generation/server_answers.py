"""What servers with OpenAI's API answer, as far as it is read here."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MOST_TOKENS = 2**31


def _without_half_characters(text: Any) -> Any:
    # Half of a surrogate pair, which JSON can spell, is no character.
    return text.encode(errors="ignore").decode() if isinstance(text, str) else text


def _first(choices: Any) -> Any:
    """The choice that was asked for, whatever a server adds to it."""
    found = choices if isinstance(choices, list) else []
    return next((each for each in found if isinstance(each, dict) and not each.get("index")), None)


def _if_counted(usage: Any) -> Any:
    """What a server counted; nothing where it left out or emptied one of the numbers."""
    is_whole = not isinstance(usage, dict) or all(usage.get(name) is not None for name in Tokens.model_fields)
    return usage or None if is_whole else None


Text = Annotated[str, BeforeValidator(_without_half_characters)]
Count = Annotated[int, Field(ge=0, lt=MOST_TOKENS)]


class _Read(BaseModel):
    model_config = ConfigDict(strict=True)


class ServedModel(_Read):
    """What a server says of a model; vLLM's alone says more than the name."""

    id: Text
    owned_by: Any = None
    max_model_len: int | None = None
    parent: Text | None = None  # The model that an adapter belongs to.


class ModelList(_Read):
    """All that a server has."""

    data: list[ServedModel]


class Tokens(_Read):
    """What was read and written."""

    prompt_tokens: Count
    completion_tokens: Count


class TextChoice(_Read):
    """A completion."""

    text: Text
    finish_reason: Literal["stop", "length", "content_filter"] | None = None
    token_ids: list[int] | None = None


class TextAnswer(_Read):
    """What completes a prompt."""

    model: Text | None = None
    choice: Annotated[TextChoice, BeforeValidator(_first)] = Field(validation_alias="choices")
    usage: Tokens


class Message(_Read):
    """A reply, which has no text where the model refused."""

    content: Text | None = None


class ChatChoice(_Read):
    """A reply in its place."""

    message: Message


class ChatAnswer(_Read):
    """What follows a question in a chat."""

    model: Text | None = None
    choice: Annotated[ChatChoice, BeforeValidator(_first)] = Field(validation_alias="choices")
    # Some servers count nothing, or not all.
    usage: Annotated[Tokens | None, BeforeValidator(_if_counted)] = None
