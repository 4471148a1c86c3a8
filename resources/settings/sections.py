"""What all sections of the settings have in common, and how two of them are merged."""

import difflib
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, field_validator

from resources.common.errors import FinalError

# Words in the names of what holds a secret, such as hf_token, s3_secret_access_key or Authorization.
SECRET_WORDS = frozenset({
    "token", "key", "keys", "apikey", "apikeys", "apitoken", "secret", "secrets", "password", "passwords", "passwd", "pwd", "auth",
    "authorization", "bearer", "credential", "credentials", "cookie",
})  # fmt: skip
# How a secret itself begins, whatever it is called.
SECRET_VALUE = re.compile(r"\b(Bearer \S{8,}|hf_[A-Za-z0-9]{16,})|^['\"\s]*(Basic \S{8,}|sk-\S+)\s*$")
UNWRITABLE = re.compile("[\0\ud800-\udfff]")


def may_be_secret(text: str) -> bool:
    """Whether a name, or a value as Python writes it, has a word for secrets; the id of a token is none.

    Examples:
        >>> may_be_secret("hfToken"), may_be_secret("api_key_1"), may_be_secret("stop_token_ids"), may_be_secret("max_tokens")
        (True, True, False, False)
    """
    for name in text.split("."):
        words = re.findall("[a-z]+", re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
        for word, after in itertools.pairwise([*words, ""]):
            if word in SECRET_WORDS and not (word in ("token", "key") and after in ("id", "ids")):
                return True
    return False


class SettingsError(FinalError, ValueError):
    """A setting is missing, unknown or impossible; the message names it and says what to do."""


def is_unwritable(value: object) -> bool:
    """Whether a value is a text that no file can hold."""
    return isinstance(value, str) and UNWRITABLE.search(value) is not None


class Section(BaseModel):
    """A part of the settings; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _writable(cls, value: Any) -> Any:
        """No text that no file can hold."""
        if is_unwritable(value):
            raise ValueError("it holds NUL or half of a surrogate pair, which are no characters.")
        return value


def section_of(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A section as written, or nothing if it is not one: the validation that follows says what is wrong."""
    section = values.get(name)
    return section if isinstance(section, dict) else {}


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field can hold: itself, or the options of a union or list."""
    options = (annotation, *get_args(annotation))
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]


def merge(base: dict[str, Any], changes: dict[str, Any], sections: Sequence[type[BaseModel]]) -> dict[str, Any]:
    """Puts changes over a base, section by section; of another variant of a section, nothing in the base applies.

    A setting whose value is a mapping is replaced as a whole.
    """
    merged = dict(base)
    for key, value in changes.items():
        known = merged.get(key)
        fields = [section.model_fields[key] for section in sections if key in section.model_fields]
        if isinstance(value, dict) and isinstance(known, dict):
            tags = [field.discriminator for field in fields if isinstance(field.discriminator, str)]
            inner = [section for field in fields for section in sections_in(field.annotation)]
            if inner and all(value.get(tag, known.get(tag)) == known.get(tag) for tag in tags):
                value = merge(known, value, inner)
        merged[key] = value
    return merged


def flattened(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of sections by dotted name."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nearest(name: str, names: Sequence[str]) -> str:
    """The end of a sentence that says what was probably meant."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean `{close[0]}`?" if close else "."
