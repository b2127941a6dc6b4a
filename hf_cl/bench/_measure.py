"""Taking turns, so that a machine that drifts touches all ways alike; medians and quartiles; the machine itself."""

import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_cl.results import versions

EVERY = 0.002
"""Seconds between two looks at a process's memory."""
BLOCK = 2.0
"""Seconds that a block of calls takes at least, where a single call is shorter."""


def turns(
    ways: Mapping[str, Callable[[], object]], count: int, *, device: str = "cpu", block: float = 0.0
) -> dict[str, list[float]]:
    """Return seconds a call for every way, one figure a turn; every other turn goes the other way around.

    A first call of each way is not counted: it builds what is kept. For blocks a second one says how many calls fit.

    Args:
        ways: What to call, by name.
        count: Turns.
        device: `cuda` is waited for around every block.
        block: Seconds that a block of equal calls shall take; 0 is one call a turn.
    """
    repeats = {}
    for name, way in ways.items():
        timed(way, device=device)
        repeats[name] = max(1, round(block / timed(way, device=device))) if block else 1
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(count):
        for name in list(ways) if turn % 2 else reversed(list(ways)):
            taken[name].append(timed(ways[name], repeats[name], device))
    return taken


def timed(way: Callable[[], object], repeat: int = 1, device: str = "cpu") -> float:
    """Return the seconds that a call takes, as the mean of some in a row."""
    wait(device)
    began = time.perf_counter()
    for _ in range(repeat):
        way()
    wait(device)
    return (time.perf_counter() - began) / repeat


def wait(device: str) -> None:
    """Wait until an accelerator has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and the third quartile; a single value is both."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def against(own: Sequence[float], rival: Sequence[float]) -> dict[str, Any]:
    """Return the median of the ratios within each turn, and their quartiles, as a row has them."""
    ratios = [mine / theirs for mine, theirs in zip(own, rival, strict=True)]
    return {"ratio": statistics.median(ratios), "quartiles": quartiles(ratios)}


def in_ms(own: Sequence[float], rival: Sequence[float]) -> dict[str, Any]:
    """Return what a row says of two lists of seconds: medians in milliseconds, and the ratio within turns."""
    values = {"value": 1000 * statistics.median(own), "theirs": 1000 * statistics.median(rival)}
    return {**values, "unit": "ms", **against(own, rival)}


def anonymous(pid: "int | str" = "self") -> int:
    """Return a process's anonymous memory in bytes; 0 when it is gone. Files that are mapped do not count."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text("ascii", "replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def in_use(device: str) -> int:
    """Return the bytes that this process holds: anonymous ones, or those that torch has on an accelerator."""
    return anonymous() if device == "cpu" else torch.cuda.memory_allocated()


class Peak:
    """The most bytes that this process holds while its block runs, `most`; on a CPU by a look every two ms."""

    def __init__(self, device: str) -> None:
        self._device, self._done = device, threading.Event()
        self._watcher = threading.Thread(target=self._watch)

    def __enter__(self) -> "Peak":
        self.most = in_use(self._device)
        if self._device == "cpu":
            self._watcher.start()
        else:
            torch.cuda.reset_peak_memory_stats()
        return self

    def _watch(self) -> None:
        while not self._done.wait(EVERY):
            self.most = max(self.most, anonymous())

    def __exit__(self, *raised: object) -> None:
        if self._device == "cpu":
            self._done.set()
            self._watcher.join()
        else:
            self.most = torch.cuda.max_memory_allocated()


def machine(device: str) -> dict[str, Any]:
    """Return what figures depend on: processor, cores, threads, load now, and versions. No date, and no name of it."""
    found: dict[str, Any] = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device != "cpu":
        found["accelerator"] = torch.cuda.get_device_name()
    return {**found, "load_before": load(), "versions": versions()}


def load() -> float:
    """Return the processes that ran or waited over the last minute, on average."""
    return round(os.getloadavg()[0], 2)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def product_rate(device: str) -> float:
    """Return floating point operations a second of a float32 matrix product, for a floor in numbers."""
    a, b = torch.randn(1024, 1024, device=device), torch.randn(1024, 1024, device=device)
    return 2 * 1024**3 / statistics.median(turns({"product": lambda: a @ b}, 5, device=device)["product"])


def copy_rate(device: str) -> float:
    """Return bytes a second that are read and written by a copy too large for a cache, for a floor in numbers."""
    source = torch.ones(16_000_000, device=device)
    target = torch.empty_like(source)
    taken = turns({"copy": lambda: target.copy_(source)}, 5, device=device)["copy"]
    return 2 * 4 * source.numel() / statistics.median(taken)
