"""How a run reads on the terminal: one short line per message, with the asset it belongs to."""

import logging

import dagster as dg
from dagster._utils.error import SerializableErrorInfo

from resources.common.text import visible

KILLED = (
    "Its process was killed, as the system does when memory runs out (`dmesg` tells): lower engine.batch_tokens, or "
    "micro_batch_size in the section `training` of what was trained, or stop other programs. Finished work is kept."
)


class _Line(logging.Formatter):
    """`14:03:12  base_responses[0001]  48 of 64 completions, 97 tokens/s, 6 s left.` A line for people."""

    def format(self, record: logging.LogRecord) -> str:
        metadata = getattr(record, "dagster_meta", {})
        where = metadata.get("step_key") or "run"
        time = self.formatTime(record, "%H:%M:%S")
        level = "" if record.levelno <= logging.INFO else f"{record.levelname}: "
        said = f"{level}{metadata.get('orig_message', record.getMessage())}"
        if (event := _event(record)) is not None:
            retry = event.step_retry_data
            said = f"WARNING: It failed, and is tried again in {retry.seconds_to_wait or 0:.0f} s. {reason_of(retry.error)}"
        return visible(f"{time}  {where:<19}  {said}")


def _event(record: logging.LogRecord) -> dg.DagsterEvent | None:
    return getattr(record, "dagster_meta", {}).get("dagster_event")


def _is_shown(record: logging.LogRecord) -> bool:
    """Whether the line is a message of an asset, or a step is tried again. `synpo run` tells at the end what failed."""
    if (event := _event(record)) is not None:
        return event.event_type == dg.DagsterEventType.STEP_UP_FOR_RETRY
    return record.levelno >= logging.INFO and "Dependencies for step" not in record.getMessage()


@dg.logger(config_schema={}, description="Short progress lines for people; events stay in the event log.")
def terminal_logger(init_context: dg.InitLoggerContext) -> logging.Logger:
    """A logger that prints what assets say and that one is tried again, but none of Dagster's other events."""
    logger = logging.getLogger("synpo.terminal")
    # Of an event that is no failure.
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Line())
        handler.addFilter(_is_shown)
        logger.addHandler(handler)
    return logger


def reason_of(error: SerializableErrorInfo | None) -> str:
    """What ended a step, in words."""
    error = first_cause(error)
    if error is None:
        return "No reason was recorded."
    if error.cls_name == "ChildProcessCrashException":
        return KILLED
    # The message starts with the full path of the exception's class, of which the name is enough.
    return f"{error.cls_name}: {error.message.partition(': ')[2].strip()}"


def first_cause(error: SerializableErrorInfo | None) -> SerializableErrorInfo | None:
    """The error that all others came of."""
    while error is not None and error.cause is not None:
        error = error.cause
    return error
