"""Merges checkpoints in a process of its own, and tells how much anonymous memory each merge took above the imports.

    python merge_watch.py WAYS WARM FOLDER OUT

WAYS is JSON, a list of [where, rule, options]; where is `disk`, or `memory`: by the function on whole state dicts, for
comparison. A tiny merge in WARM comes first: what is imported late is imported then.
"""

import json
import sys
import threading
from pathlib import Path

import torch
from safetensors.torch import load_file

from hf_cl import merge_checkpoints
from hf_cl.merging.ties import ties


def anonymous():
    """Return this process's anonymous memory in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def merge(way, rule, options, folder, out):
    places = [folder / name for name in ("base", "a", "b")]
    if way == "disk":
        merge_checkpoints(rule, places[0], places[1:], out, options=options, max_shard_size="20MB")
    else:
        base, *models = (
            {k: v.clone() for f in sorted(p.glob("*.safetensors")) for k, v in load_file(f).items()} for p in places
        )
        ties(base, models, **options)


def main(ways, warm, folder, out):
    torch.set_num_threads(1)
    peaks = []
    merge("disk", "ties", {}, Path(warm), Path(f"{out} warm"))
    held = anonymous()
    for number, way in enumerate(json.loads(ways)):
        peak, done = [0], threading.Event()

        def watch(peak=peak, done=done):
            while not done.wait(0.001):
                peak[0] = max(peak[0], anonymous())

        watcher = threading.Thread(target=watch)
        watcher.start()
        merge(*way, Path(folder), Path(f"{out} {number}"))
        done.set()
        watcher.join()
        peaks.append(peak[0] - held)
    sys.stdout.write(json.dumps(peaks) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
