"""What a server says, fit for a log or a sentence."""

import os

from resources.common.text import visible

MOST_SHOWN = 400


def stated_key() -> str:
    """What OPENAI_API_KEY holds without white space around it; empty if nothing."""
    return os.environ.get("OPENAI_API_KEY", "").strip()


def redacted(text: str, most: int = MOST_SHOWN) -> str:
    """The beginning of a text in one line, without escape sequences, and without the key if it repeats it."""
    # Before it is cut, which could leave half of the key.
    if key := stated_key():
        text = text.replace(key, "[OPENAI_API_KEY]")
    # What is shown of it is no longer than this, and to make all of it visible would take long.
    text = visible(" ".join(text.lstrip()[: 4 * most].split()))
    return text if len(text) <= most else text[:most] + "..."
