"""Keeping libraries from talking over what is asked for.

Everything they write to stdout goes to stderr while they work, so that stdout holds the answer alone. What is
silenced is noise on every machine that it appears on; warnings of this package are never touched.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def libraries() -> Iterator[None]:
    """Run heavy work with stdout turned to stderr and the libraries' noise off."""
    import datasets
    from transformers.utils import logging

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    # Loading a base takes a second; the Trainer's own bar and downloads' bars are others and stay.
    logging.disable_progress_bar()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        # Accelerate asks for pinned memory also where there is no accelerator.
        warnings.filterwarnings("ignore", message=".*pin_memory.*", category=UserWarning)
        # PEFT asks transformers by a name that transformers has since changed; nobody here can act on it.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        # torch renames an option of DDP that the Trainer passes on.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        yield
