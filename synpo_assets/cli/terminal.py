"""How a run reads on the terminal: one short line per message, with the asset it belongs to."""

import logging

import dagster as dg

from resources.common.text import visible


class _Line(logging.Formatter):
    """`14:03:12  base_responses[0001]  48 of 64 completions, 97 tokens/s, 6 s left.` A line for people."""

    def format(self, record: logging.LogRecord) -> str:
        metadata = getattr(record, "dagster_meta", {})
        where = metadata.get("step_key") or "run"
        time = self.formatTime(record, "%H:%M:%S")
        level = "" if record.levelno <= logging.INFO else f"{record.levelname}: "
        return visible(f"{time}  {where:<19}  {level}{metadata.get('orig_message', record.getMessage())}")


def _is_from_asset(record: logging.LogRecord) -> bool:
    """Whether the line is a message of an asset. Failures are told by `synpo run` at the end, with their reason."""
    event = getattr(record, "dagster_meta", {}).get("dagster_event")
    return event is None and "Dependencies for step" not in record.getMessage()


@dg.logger(config_schema={}, description="Short progress lines for people; events stay in the event log.")
def terminal_logger(init_context: dg.InitLoggerContext) -> logging.Logger:
    """A logger that prints what assets say, but not Dagster's own events."""
    logger = logging.getLogger("synpo.terminal")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Line())
        handler.addFilter(_is_from_asset)
        logger.addHandler(handler)
    return logger
