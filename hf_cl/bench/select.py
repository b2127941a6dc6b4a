"""Keeping masks up to date: kept thresholds, refreshes included, against sorting each layer.

Measured: the mean over 200 training-like steps, since only some of them renew a threshold; scores drift as Adam moves
them under a falling learning rate. Composing the weight is not in it.

Against: sorting every layer's scores, as the papers' code does, on the same scores, five times along the way. A ratio
is that of a fifth of the steps.

Floor: every score is read once and compared, and a byte of mask written: 5 bytes an entry at the rate of a copy. A
sort of n float32 by radix reads and writes keys and places in four passes at least, 64 bytes an entry, and a
comparison sort more: so about 5/64 at equal rates, and less the further a sort is from the memory's rate.
"""

import statistics
from collections.abc import Iterator

import torch

from hf_cl.bench._measure import against, copy_rate, timed
from hf_cl.bench._models import masked_entries, shapes
from hf_cl.bench._row import Mark, Row, Settings, Tell
from hf_cl.masks.select import kept_count, refresh_masks

DENSITIES = (0.005, 0.01, 0.02, 0.1, 0.5)
STEPS, BLOCKS, RATE = 200, 5, 0.01


def run(settings: Settings, tell: Tell) -> Iterator[Row]:
    """Yield the milliseconds a step, by model and density."""
    for size in settings.models():
        for density in DENSITIES[1:2] if settings.quick else DENSITIES:
            tell(f"{size}, density {density:g}")
            yield from measure(size, density, settings)


def measure(size: str, density: float, settings: Settings) -> Iterator[Row]:
    """Yield one density's rows."""
    device, steps = settings.device, 2 * BLOCKS if settings.quick else STEPS
    generator = torch.Generator(device).manual_seed(0)

    def normal(shape: tuple[int, int]) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    scores = [normal(shape) * 1e-4 for shape in shapes(size)]
    trend = [normal(shape) * 0.5 for shape in shapes(size)]
    masks = [torch.zeros_like(score, dtype=torch.bool) for score in scores]
    counts = [kept_count(score.numel(), density) for score in scores]
    thresholds = torch.full((len(scores),), float("nan"), device=device)
    each: list[float] = []
    sorting, renewed = [], [0]

    def refresh() -> None:
        renewed[0] += refresh_masks(scores, masks, thresholds, counts)

    def sort() -> None:
        for score in scores:
            score.flatten().sort()

    timed(sort, device=device)  # the first one makes room
    for step in range(steps):
        for score, direction in zip(scores, trend, strict=True):
            # As Adam does: at most a learning rate a step, half trend, half noise.
            noise = torch.randn(score.shape, generator=generator, device=device)
            score.add_((direction + noise).clamp_(-1, 1), alpha=RATE * (1 - step / steps))
        each.append(timed(refresh, device=device))
        if (step + 1) % (steps // BLOCKS) == 0:
            sorting.append(timed(sort, device=device))
    long = steps // BLOCKS
    ours = [statistics.mean(each[block * long : (block + 1) * long]) for block in range(BLOCKS)]
    least = 5 * masked_entries(size) / copy_rate(device)
    sort_s = statistics.median(sorting)
    under = {"model": size, "density": density, "device": device}
    floor = f"{1000 * least:.2f} ms, {least / sort_s:.4f} of the sort: 5 bytes an entry at a copy's rate"
    yield Row(
        "select", "masks kept up to date, a step", under, 1000 * statistics.mean(each), "ms", floor,
        "sorting each layer", 1000 * sort_s, mark=Mark(0.05), **against(ours, sorting),
    )  # fmt: skip
    often = "0, where no score moves"
    yield Row("select", "thresholds renewed a step", under, renewed[0] / steps, f"of {len(scores)}", often)
