"""The error that a person may see: one sentence that says what is wrong and what to do."""


class SidstreamError(Exception):
    """Anything a command ends on. Its text names the thing, the value and the remedy, in one line."""
