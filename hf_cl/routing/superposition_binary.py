"""The superposition, halved until one task is left: log2 k backward passes; see `superposition`.

Source: SupSup, arXiv 2006.14769, binary inference.
"""

from hf_cl.routing import Tasks
from hf_cl.routing.superposition import Superposition


def build(tasks: Tasks) -> Superposition:
    """Return the router."""
    return Superposition(tasks, binary=True)
