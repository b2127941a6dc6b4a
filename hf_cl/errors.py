"""Every error this package raises on purpose.

HfClError
├── ConfigError       an option is unknown, misspelt or out of its range
├── DataError         a data set, a column, a label or a split is not what the task says
├── BaseModelError    the base cannot be masked, or is not the one a run was learned on
├── MergeError        models cannot be merged: other tensors, shapes or bases, NaN, a format that is not read
├── OwnershipError    a task would need, or has moved, an entry that it may not have
├── TrainingError     a task's training cannot go on (non-finite loss, stopped before its claim)
├── StoppedError      the job was asked to stop (SIGTERM, SIGUSR1); what it had is saved
├── RankError         the processes of one job disagree, or one of them failed
├── RunError          a run folder exists already, is incomplete, or does not hold what it says
└── BankError         a bank cannot be read, written or used
    ├── BankCorruptError    its bytes are not what its manifest says, or no bank's at all
    ├── BankConflictError   another writer was first, or two banks claim the same entries
    └── BaseMismatchError   it was learned on another base (a BaseModelError too)

Each message says where, what was found, and the way out. The first four (and `BaseMismatchError`) are
also `ValueError`, so a caller who knows nothing of this package catches them as usual.
"""


def shown(text: str) -> str:
    """Return a name from somebody's file as an error shows it: what is not printable is escaped."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


class HfClError(Exception):
    """Base of all errors of this package."""


class ConfigError(HfClError, ValueError):
    """An option is unknown, misspelt or out of its range."""


class DataError(HfClError, ValueError):
    """A data set, a column, a label or a split is not what the task says."""


class BaseModelError(HfClError, ValueError):
    """The base model cannot be masked, or is not the one a run was learned on."""


class MergeError(HfClError, ValueError):
    """Models cannot be merged: other tensors, shapes or bases, NaN, or a format that is not read."""


class OwnershipError(HfClError, RuntimeError):
    """A task needs an entry that it may not have, or an owned entry has moved."""


class TrainingError(HfClError, RuntimeError):
    """A task's training cannot go on; nothing of that task is committed."""


class StoppedError(HfClError, RuntimeError):
    """The job was asked to stop; what it had is saved, and it can go on from there."""


class RankError(HfClError, RuntimeError):
    """The processes of one job hold different things, or one of them failed."""


class RunError(HfClError, RuntimeError):
    """A run folder exists already, is incomplete, or does not hold what it says."""


class BankError(HfClError, RuntimeError):
    """A bank cannot be read, written or used."""


class BankCorruptError(BankError):
    """A bank's bytes are not what its manifest says, or are no bank's at all."""


class BankConflictError(BankError):
    """Another writer was first, or two banks claim the same entries."""


class BaseMismatchError(BankError, BaseModelError):
    """A bank was learned on another base than the one it is given."""
