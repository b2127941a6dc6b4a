"""Every error this package raises on purpose.

HfClError
├── ConfigError       an option is unknown, misspelt or out of its range
├── DataError         a data set, a column, a label or a split is not what the task says
├── BaseModelError    the base cannot be masked, or is not the one a run was learned on
├── OwnershipError    a task would need, or has moved, an entry that it may not have
├── TrainingError     a task's training cannot go on (non-finite loss, stopped before its claim)
└── RunError          a run folder exists already, is incomplete, or does not hold what it says

Each message says where, what was found, and the way out. The first three are also
`ValueError`, so a caller who knows nothing of this package catches them as usual.
"""


class HfClError(Exception):
    """Base of all errors of this package."""


class ConfigError(HfClError, ValueError):
    """An option is unknown, misspelt or out of its range."""


class DataError(HfClError, ValueError):
    """A data set, a column, a label or a split is not what the task says."""


class BaseModelError(HfClError, ValueError):
    """The base model cannot be masked, or is not the one a run was learned on."""


class OwnershipError(HfClError, RuntimeError):
    """A task needs an entry that it may not have, or an owned entry has moved."""


class TrainingError(HfClError, RuntimeError):
    """A task's training cannot go on; nothing of that task is committed."""


class RunError(HfClError, RuntimeError):
    """A run folder exists already, is incomplete, or does not hold what it says."""
