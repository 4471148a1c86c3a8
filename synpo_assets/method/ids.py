"""Short content hashes that identify rows and chain them: keyword set -> prompt -> response -> pair."""

import hashlib
import json


def content_id(kind: str, *content: object) -> str:
    """An id that depends on JSON-serialisable content alone: the kind and 16 hex digits, `prompt-3f9a0c...`."""
    digest = hashlib.sha256(json.dumps([kind, *content], ensure_ascii=False).encode()).hexdigest()
    return f"{kind}-{digest[:16]}"
