"""What a task of each run weighs: its mask, values and head, beside the bound of independent entries and beside LoRA.

run: python scripts/bank_table.py RUN ...   (finished runs; prints a Markdown table, writes docs/benchmarks/bytes.json)
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hf_cl import MaskBank
from hf_cl.bench.coding import bound
from hf_cl.packing.shelf import open_entry
from hf_cl.storage.bank_folder import FolderReader

OUT = Path(__file__).parents[1] / "docs" / "benchmarks" / "bytes.json"


def row(run: Path) -> dict[str, Any]:
    """Return a run's means a task."""
    found = json.loads((run / "results.json").read_text("utf-8"))
    count = len(found["tasks"])
    options = found["method"]["options"]
    made: dict[str, Any] = {
        "stream": found["stream"],
        "method": found["method"]["name"],
        "density": options.get("density"),
        "rank": options.get("r"),
        "bytes_a_task": sum(found["bytes_per_task"].values()) / count,
        "head_bytes": sum(found["head_bytes_per_task"].values()) / count,
        "accuracy": found["average_accuracy"],
        "exact": found["exact"],
    }
    return made | (_bank(run / "bank") if (run / "bank").exists() else {})


def _bank(folder: Path) -> dict[str, Any]:
    manifest = MaskBank.from_pretrained(folder).manifest
    sums: dict[str, float] = {"masks": 0, "values": 0, "bound": 0, "codes": 0}
    for task in manifest.tasks:
        opened = open_entry(task, FolderReader(folder))
        sums["masks"] += task.sizes["masks"]
        sums["values"] += task.sizes["values"]
        sums["codes"] += opened.code_bytes
        sums["bound"] += float(np.sum([bound(part.mask.numpy()) for part in opened.parts(manifest.store)]))
    means = {f"{name}_bytes": value / len(manifest.tasks) for name, value in sums.items()}
    return means | {"codes_of_bound": sums["codes"] / sums["bound"]}


def line(found: Mapping[str, Any]) -> str:
    """Return a row of the table."""

    def size(name: str) -> str:
        return f"{found[name]:,.0f}" if name in found else "-"

    what = f"density {found['density']:g}" if found["density"] is not None else f"rank {found['rank']}"
    share = f"{found['codes_of_bound']:.3f}" if "codes_of_bound" in found else "-"
    cells = [
        found["method"],
        what,
        size("bytes_a_task"),
        size("masks_bytes"),
        size("values_bytes"),
        size("bound_bytes"),
    ]
    return "| " + " | ".join([*cells, share, size("head_bytes"), f"{found['accuracy']:.4f}"]) + " |"


if __name__ == "__main__":
    rows = sorted((row(Path(run)) for run in sys.argv[1:]), key=lambda found: found["bytes_a_task"])
    OUT.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    print("| method | size | bytes a task | mask | values | bound | codes/bound | head | accuracy |")
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(line(found) for found in rows))
