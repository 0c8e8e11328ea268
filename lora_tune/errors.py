"""The one tree of errors: what happened, what to do next, and the exit code that a shell sees.

The class decides the exit code and the HTTP status; the text never does.
"""

from typing import ClassVar


class LoraTuneError(Exception):
    """Something the user can act on; shown as one line, a blank line and the hint.

    Args:
        message: what is wrong: the thing, the value found and the value expected.
        hint: one action that the user can take next.
        where: a `file:line` or the path of a recipe's field, when there is one.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, hint: str = "", where: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.where = where

    def as_dict(self) -> dict[str, str]:
        """The error as `--json` prints it."""
        return {"code": self.code, "message": self.message, "hint": self.hint, "where": self.where}


class UsageError(LoraTuneError):
    """The command line asks for something that cannot be meant."""

    code, exit_code, http_status = "usage", 2, 400


class RecipeError(LoraTuneError):
    """The recipe is wrong; the message lists every problem with its line."""

    code, exit_code, http_status = "recipe", 65, 400


class DataError(LoraTuneError):
    """Rows that cannot be trained on."""

    code, exit_code, http_status = "data", 65, 400


class TrainingError(LoraTuneError):
    """Training cannot go on: its numbers are no longer numbers."""

    code, exit_code, http_status = "training", 65, 500


class StoppedError(LoraTuneError):
    """A signal ended the run; what it had done is kept, and the hint goes on from there."""

    code, exit_code, http_status = "interrupted", 75, 503


class MissingInputError(LoraTuneError):
    """A file, folder, base or adapter that was named is not there, or is damaged."""

    code, exit_code, http_status = "missing", 66, 404


class UnreachableError(LoraTuneError):
    """A hub or a package registry cannot be reached."""

    code, exit_code, http_status = "unreachable", 69, 502


class OutOfMemoryError(LoraTuneError):
    """The run needs more memory than the device has."""

    code, exit_code, http_status = "out_of_memory", 71, 507


class CannotCreateError(LoraTuneError):
    """A folder or file cannot be made, or is there already and is never overwritten."""

    code, exit_code, http_status = "cannot_create", 73, 409


class CannotWriteError(LoraTuneError):
    """Writing failed half-way: disk full or an input/output error; nothing half-written is left."""

    code, exit_code, http_status = "cannot_write", 74, 507


class RefusedError(LoraTuneError):
    """Refused for safety: adapter, base, tokenizer or template do not belong together, or a file is hostile."""

    code, exit_code, http_status = "refused", 77, 412


class AdapterError(RefusedError):
    """An adapter's folder is not what an adapter's folder must be."""

    code, exit_code, http_status = "adapter", 77, 412


class AdapterMismatchError(RefusedError):
    """The adapter does not belong to this base, tokenizer or template."""

    code, exit_code, http_status = "adapter_mismatch", 77, 412


class RequestError(LoraTuneError):
    """A request to a server asks for what is out of bounds."""

    code, exit_code, http_status = "bad_request", 2, 400


class ConflictError(LoraTuneError):
    """What is asked for cannot be done while something else is as it is."""

    code, exit_code, http_status = "conflict", 73, 409


class UnsupportedError(LoraTuneError):
    """This engine cannot do it; the hint names what can."""

    code, exit_code, http_status = "unsupported", 69, 422


class BusyError(LoraTuneError):
    """Every place is taken; later there may be one."""

    code, exit_code, http_status = "busy", 75, 429


class DrainingError(LoraTuneError):
    """A server that is shutting down takes nothing new."""

    code, exit_code, http_status = "draining", 75, 503
