"""Every error a user can cause. Messages say what was wrong, what was expected and what to do.

The command line prints the message of any `CoachhookError` as one line and exits with status 2.
"""


class CoachhookError(Exception):
    """Base of all errors that `coachhook` raises on purpose."""


class ConfigError(CoachhookError, ValueError):
    """A setting is out of range, or two settings exclude each other."""


class RequestError(CoachhookError, ValueError):
    """An edit request is unusable: empty subject or target, subject not in the prompt, ..."""


class ContradictionError(RequestError):
    """Two requests of one batch ask for different targets of the same prompt and subject."""


class RecordError(CoachhookError, ValueError):
    """A facts file cannot be read, or one of its records is malformed (file, line, reason)."""


class ContextLengthError(RequestError):
    """A prompt with its target does not fit the model's context."""


class ModelError(CoachhookError):
    """A model or tokenizer cannot be loaded or used."""


class ArchitectureError(ModelError):
    """The registry does not know where this architecture keeps its down-projection."""


class NotEnoughMemoryError(CoachhookError):
    """A run, or a single step of it, does not fit in memory; the message says what to change."""


class ProfileError(CoachhookError):
    """A profile of settings cannot be read or written, is malformed, or has a newer version."""


class StatisticsError(CoachhookError):
    """Key statistics cannot be measured, or keys or their second moment are unusable."""


class AttachError(CoachhookError, RuntimeError):
    """This model's hooks are not in the state an operation needs, or it cannot take hooks."""


class BaseModelMismatchError(AttachError):
    """The hooks were made for a model with other weights."""


class FolderError(CoachhookError):
    """A hooks folder cannot be read or written."""


class CorruptFolderError(FolderError):
    """A file of a hooks folder is missing, malformed, or was changed after it was written."""


class NewerFormatError(FolderError):
    """A hooks folder was written by a newer version of the format."""


class OlderFormatError(FolderError):
    """A hooks folder was written in an earlier format that is no longer read."""


class FolderLockedError(FolderError):
    """Another process is editing this folder."""


class SaveError(FolderError):
    """Writing failed (no space left, no permission); the folder's earlier contents are intact."""


class ProcessError(CoachhookError, RuntimeError):
    """Another process of a torchrun job has died, or cannot be reached."""


class CompactedError(CoachhookError):
    """An operation needs the individual batches that `compact` has merged into one."""
