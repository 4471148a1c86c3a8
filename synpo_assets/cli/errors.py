"""What commands say of a home or a disk that cannot be used."""

import os
import sqlite3
import tempfile
import traceback

from resources.common.errors import DISK_IS_FULL, SQLITE_FAILS, full_disk


def defect_sentence(error: Exception) -> str:
    """What to do about an error that nobody foresaw; its trace is written into a file for whoever mends it."""
    with tempfile.NamedTemporaryFile("w", prefix="synpo-", suffix=".trace", delete=False, encoding="utf-8") as file:
        file.writelines(traceback.format_exception(error))
    return (
        f"{type(error).__name__}, which is a defect of synpo. Finished work is kept. Its trace is in {file.name}: report it with "
        "that file."
    )


def sentence_of(error: BaseException) -> str | None:
    """What is wrong with a home or its disk, and what mends it; None if an error tells of neither."""
    if (reason := full_disk(error)) is not None:
        return DISK_IS_FULL.format(reason)
    home = os.environ.get("DAGSTER_HOME", "the home")
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, sqlite3.DatabaseError):
            was_full = (
                "If the disk was full, free some space and give the same command again. Else put"
                if SQLITE_FAILS in str(cause)
                else "Put"
            )
            return (
                f"The history in {home}/history cannot be used: {cause}. {was_full} the folder back from a copy; or move it away, "
                "and `synpo run` makes everything again, for which it reads the finished completions in the folder shards."
            )
        if type(cause).__name__ == "DagsterInvalidConfigError":
            return f"{home}/dagster.yaml is no configuration of Dagster: move it away, and it is written anew."
        if isinstance(cause, OSError) and cause.filename is not None:
            return (
                f"{cause.filename} cannot be used: {cause.strerror}. Put back what belongs there, or move away what does not, and "
                "give the same command again."
            )
        cause = cause.__cause__ or cause.__context__
    return None
