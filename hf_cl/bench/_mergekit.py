"""Merge by mergekit, in an environment that has it and nothing of hf_cl: the text of this file is run by `python -c`.

Arguments: the folder of the base and the models, the folder to write, and the merge as JSON: its method, the method's
parameters, each model's, and the models' number. It keeps to the protocol of `hf_cl/bench/_child.py`.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Say `ready` after the imports, merge on `go`, and say how long it took."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    place, out, asked = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    models = [
        {"model": str(place / f"model-{number}"), "parameters": {"weight": 1.0, **asked["each"]}}
        for number in range(asked["models"])
    ]
    config: dict[str, Any] = {
        "merge_method": asked["method"], "models": models, "parameters": asked["parameters"], "dtype": "float32"
    }  # fmt: skip
    if asked["method"] != "linear":
        config["base_model"] = str(place / "base")
    made = MergeConfiguration.model_validate(config)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    if sys.stdin.readline() == "go\n":
        began, spent = time.perf_counter(), time.process_time()
        run_merge(made, out, MergeOptions(quiet=True, copy_tokenizer=False))
        found = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - spent}
        sys.stdout.write(f"\n{json.dumps(found)}\n")


if __name__ == "__main__":
    main()
