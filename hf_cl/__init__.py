"""Continual learning for Hugging Face text classifiers: exclusive masked adapters that never forget.

    text -> tokens            hf_cl.data
    scores -> masks           hf_cl.masks, hf_cl.ownership
    masked model              hf_cl.tuner (a PEFT method), hf_cl.layers
    training                  hf_cl.training, hf_cl.starts, hf_cl.methods
    run folder, proof, bank   hf_cl.storage, hf_cl.runs, hf_cl.bank
    merging                   hf_cl.merging (rules), hf_cl.checkpoints, hf_cl.disk_merge
    the whole way             hf_cl.train_stream, hf_cl.ContinualLearner

Importing this brings no torch; a name brings what it needs when it is asked for. `from hf_cl import
MaskConfig` (or `import hf_cl.tuner`) registers the PEFT method.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_cl.bank import MaskBank as MaskBank
    from hf_cl.data import Task as Task
    from hf_cl.data import TaskSpec as TaskSpec
    from hf_cl.data import load_task as load_task
    from hf_cl.data import read_stream as read_stream
    from hf_cl.data import task_from_datasets as task_from_datasets
    from hf_cl.disk_merge.merge import merge_checkpoints as merge_checkpoints
    from hf_cl.learner import ContinualLearner as ContinualLearner
    from hf_cl.metrics import AccuracyMatrix as AccuracyMatrix
    from hf_cl.runs import open_run as open_run
    from hf_cl.runs import verify as verify
    from hf_cl.train_stream import run_stream as run_stream
    from hf_cl.training.averaging_callback import AveragingCallback as AveragingCallback
    from hf_cl.training.ownership_callback import OwnershipCallback as OwnershipCallback
    from hf_cl.tuner import MaskConfig as MaskConfig

_HOME = {
    "AccuracyMatrix": "hf_cl.metrics",
    "AveragingCallback": "hf_cl.training.averaging_callback",
    "ContinualLearner": "hf_cl.learner",
    "MaskBank": "hf_cl.bank",
    "MaskConfig": "hf_cl.tuner",
    "OwnershipCallback": "hf_cl.training.ownership_callback",
    "Task": "hf_cl.data",
    "TaskSpec": "hf_cl.data",
    "load_task": "hf_cl.data",
    "merge_checkpoints": "hf_cl.disk_merge.merge",
    "open_run": "hf_cl.runs",
    "read_stream": "hf_cl.data",
    "run_stream": "hf_cl.train_stream",
    "task_from_datasets": "hf_cl.data",
    "verify": "hf_cl.runs",
}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hf_cl' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
