"""Tasks to learn from: where their rows come from, how they are cut, and their tokens.

A `TaskSpec` says what a task is, `load_task` reads it into a `Task`, `tokenise` turns that into what a
`Trainer` takes. A stream is a tuple of specs, in the order in which they are learned.
"""

from hf_cl.data.sources import load_task as load_task
from hf_cl.data.sources import read_texts as read_texts
from hf_cl.data.sources import task_from_datasets as task_from_datasets
from hf_cl.data.stream import read_stream as read_stream
from hf_cl.data.task import Task as Task
from hf_cl.data.task import TaskSpec as TaskSpec
from hf_cl.data.task import measured_on as measured_on
from hf_cl.data.task import spec_values as spec_values
from hf_cl.data.tokens import collator as collator
from hf_cl.data.tokens import tokenise as tokenise
