"""What a scheduler sends before it takes a machine away: SIGTERM or SIGUSR1, noted until there is a moment to save."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass
class StopRequest:
    """Whether this process was asked to stop, and by what.

    Attributes:
        signal: The signal's name; None while nobody has asked.
    """

    signal: str | None = None


@contextlib.contextmanager
def listening() -> Iterator[StopRequest]:
    """Note signals instead of dying of them, as long as the context lasts; outside the main thread none is heard."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number).name

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
