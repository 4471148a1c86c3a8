"""The error of a step that would fail in the same way again."""

import errno
import os
import re
import shutil

import dagster as dg

FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)
# What the operating system and SQLite say of a disk that is full, or of a quota that is used up.
FULL = re.compile(
    r"(\[Errno \d+\] )?(No space left on device|Disk quota exceeded|database or disk is full)(: '[^']*')?"
)
# What SQLite says of any failure of a disk, also of a full one where it cannot make its index of the log, and what PyTorch's
# writer of files says of it.
SQLITE_FAILS = "disk I/O error"
FAILS = (SQLITE_FAILS, "inline_container.cc", "PytorchStreamWriter")
LEAST_FREE = 1 << 26
# What the operating system says of a file whose bytes the disk cannot give any more: it is damaged.
UNREADABLE = (errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ELOOP)
# Its user with a password, or one as long as a token, and what follows a question mark.
URL = re.compile(r"(?<=://)([^\s/@]*:\S*@|[^\s/@]{16,}@)?([^\s?]*)(\?\S*\w)?")
DISK_IS_FULL = (
    "A disk is full ({}). Finished work is kept: free some space (`synpo clean` lists what is not needed any more) and give the "
    "same command again."
)


class FinalError(dg.Failure):
    """Something that trying again cannot mend, so the step is not retried; the message says what can mend it.

    Whatever the message was made of, it shows no password of a URL.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message), allow_retries=False)


class DamageError(FinalError):
    """What was made is gone, or is not as it was written; to make it again mends that, which `synpo run` does by itself."""

    def __init__(self, problem: str, label: str) -> None:
        super().__init__(f"{problem}: materialize {label} again (`synpo run` does).")
        self.problem = problem


class ModelSourceError(RuntimeError):
    """A model or a dataset cannot be had; the message says why and what to do, and shows no password of a URL."""

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


def without_secrets(text: str) -> str:
    """A text whose URLs tell neither their password nor their query.

    Examples:
        >>> without_secrets("No answer from https://me:secret@host/v1?key=secret.")
        'No answer from https://…@host/v1?….'
    """
    return URL.sub(lambda url: ("…@" if url[1] else "") + url[2] + ("?…" if url[3] else ""), text)


def full_disk(error: BaseException | str | None) -> str | None:
    """What an error, or one that it came of, says of a full disk; None if that is not the cause."""
    while isinstance(error, BaseException):
        if (reason := full_disk(str(error))) is not None:
            return reason
        error = error.__cause__ or error.__context__
    error = error or ""
    if (found := FULL.search(error)) is not None:
        return found[0]
    return next((said for said in FAILS if said in error), None) if _home_is_full() else None


def _home_is_full() -> bool:
    home = os.environ.get("DAGSTER_HOME")
    return home is not None and os.path.isdir(home) and shutil.disk_usage(home).free < LEAST_FREE
