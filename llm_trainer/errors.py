"""What can go wrong: each error carries a whole message and the exit code that the command line ends with."""


class LLMTrainerError(Exception):
    """A problem whose message tells what happened, why, and the next command; never shown with a traceback."""
    exit_code = 1


class UsageError(LLMTrainerError, ValueError):
    """A flag, value or request that can't be meant: nothing was started or changed."""
    exit_code = 2


class ConfigError(UsageError):
    """A profile or override that does not validate; names the file, the key and the nearest valid one."""


class DataError(UsageError):
    """A corpus that is missing text, unreadable or too small to train on."""
    code = "data"


class NotFoundError(LLMTrainerError):
    """A run, checkpoint or file that was named does not exist."""
    exit_code = 3


class BusyError(LLMTrainerError):
    """Another process owns what was asked for."""
    exit_code = 75


class CheckpointError(LLMTrainerError):
    """A checkpoint that is damaged, unfinished or not what its name says."""


class RunFailed(LLMTrainerError):
    """Training ended without finishing; `code` is the reason code stored in state.json."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code
