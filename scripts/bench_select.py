"""What keeping a mask up to date costs: mean over 200 training-like steps, refreshes included, beside sorting.

Scores of MiniLM's 36 linears drift as Adam moves them under a decaying learning rate. Each step is timed for
our kept thresholds and, on the same scores, for sorting every layer (the papers' code), in one process.
run: python scripts/bench_select.py
"""

import json
import statistics
import time

import torch

from hf_cl.masks.select import kept_count, refresh_masks

SHAPES = [(384, 384)] * 24 + [(1536, 384)] * 6 + [(384, 1536)] * 6
STEPS, RATE = 200, 0.01


def drift(scores: list[torch.Tensor], trend: list[torch.Tensor], step: int) -> None:
    """Move scores as Adam does: at most a learning rate a step, half trend, half noise."""
    rate = RATE * (1 - step / STEPS)
    for score, direction in zip(scores, trend, strict=True):
        score.add_((direction + torch.randn_like(score)).clamp_(-1, 1), alpha=rate)


def measure(density: float) -> dict[str, float]:
    """Return milliseconds a step and the ratio to sorting for one density."""
    torch.manual_seed(0)
    scores = [torch.randn(shape) * 1e-4 for shape in SHAPES]
    trend = [torch.randn(shape) * 0.5 for shape in SHAPES]
    masks = [torch.zeros(shape, dtype=torch.bool) for shape in SHAPES]
    counts = [kept_count(score.numel(), density) for score in scores]
    thresholds = torch.full((len(SHAPES),), float("nan"))
    ours, sorting, renewed = [], [], 0
    for step in range(STEPS):
        drift(scores, trend, step)
        start = time.perf_counter()
        renewed += refresh_masks(scores, masks, thresholds, counts)
        ours.append(time.perf_counter() - start)
        if step % 20 == 0:
            start = time.perf_counter()
            for score in scores:
                score.flatten().sort()
            sorting.append(time.perf_counter() - start)
    mean, sort = statistics.mean(ours), statistics.median(sorting)
    return {
        "density": density,
        "ms_mean": round(1000 * mean, 2),
        "ms_median": round(1000 * statistics.median(ours), 2),
        "thresholds_renewed_a_step": round(renewed / STEPS, 2),
        "ms_sort": round(1000 * sort, 1),
        "ratio": round(mean / sort, 4),
    }


if __name__ == "__main__":
    for share in (0.005, 0.01, 0.02, 0.1, 0.5):
        print(json.dumps(measure(share)))
