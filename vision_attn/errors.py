"""The errors that a person's input can cause.

They stand below everything else, so that every module can raise them. The command line prints them as one line and
exits with 2; any other exception is a bug of ours and keeps its traceback.

    ValueError
    └── UsageError
        ├── AttentionNotFoundError
        └── CheckpointMismatchError
"""


class UsageError(ValueError):
    """What a person gave cannot be used. The message says what was expected, what came, and what to do next."""


class AttentionNotFoundError(UsageError):
    """A model ran and no attention was seen. The message names the remedy."""


class CheckpointMismatchError(UsageError):
    """A checkpoint does not fit the model. The message lists the differences key by key."""


class StoppedError(Exception):
    """A signal ended a command in good order. The message says how to go on.

    Attributes:
        signal: Its number; a process ended by it exits with 128 more.
    """

    def __init__(self, message: str, *, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
