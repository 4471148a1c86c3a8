"""What all sections of the settings have in common, and how two of them are merged."""

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict


class SettingsError(ValueError):
    """A setting is missing, unknown or impossible; the message names it and says what to do."""


class Section(BaseModel):
    """A part of the settings; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def section_of(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A section as written, or nothing if it is not one: the validation that follows says what is wrong."""
    section = values.get(name)
    return section if isinstance(section, dict) else {}


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Sections as written, the changes before the base."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def nearest(name: str, names: list[str]) -> str:
    """The end of a sentence that says what was probably meant."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean `{close[0]}`?" if close else "."
