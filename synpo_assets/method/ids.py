"""Short content hashes that identify rows and chain them: keyword set -> prompt -> response -> pair."""

import hashlib
import json


def content_id(kind: str, *content: object) -> str:
    """An id that depends on content alone, such as `prompt-3f9a0c...`.

    Args:
        kind: What the row is; becomes the prefix.
        content: Everything that makes the row what it is, JSON-serialisable.

    Returns:
        The kind and 16 hex digits.
    """
    digest = hashlib.sha256(json.dumps([kind, *content], ensure_ascii=False).encode()).hexdigest()
    return f"{kind}-{digest[:16]}"
