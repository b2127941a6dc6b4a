"""What a bank's tasks answer, and what a checkpoint answers that was exported from one: two processes of the proof.

    python scripts/proof/answers.py bank < request.json         # by hf_cl, from the bank's files
    python scripts/proof/answers.py checkpoint < request.json   # by transformers alone

Logits are printed as JSON numbers, which give a float32 back bit for bit.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    """Answer the request on standard input."""
    ask = {"bank": bank, "checkpoint": checkpoint}[sys.argv[1]]
    answer = json.dumps(ask(json.load(sys.stdin)))
    print(answer)


def bank(request: dict[str, Any]) -> dict[str, Any]:
    """Return the test metrics of every task of a bank, and some tasks' logits; nothing but its files is known."""
    from hf_cl import MaskBank, TaskSpec, load_task
    from hf_cl.cli.quiet import libraries
    from hf_cl.from_recipe import training_arguments

    training = dict(request["training"])
    length = training.pop("max_length")
    with libraries(), tempfile.TemporaryDirectory() as scratch:
        args = training_arguments(training, Path(scratch))
        opened = MaskBank.from_pretrained(request["bank"])
        learner = opened.extend(request["model"], training_args=args, max_length=length)
        for task in request["tasks"]:
            learner.remember(load_task(TaskSpec(**task)))
        found: dict[str, Any] = {"metrics": learner.evaluate(), "logits": {}}
        for name, rows in request["rows"].items():
            learner.activate(name)
            found["logits"][name] = logits(learner.model, learner.base.tokenizer, rows, length)
    return found


def checkpoint(request: dict[str, Any]) -> dict[str, Any]:
    """Return the logits of an exported checkpoint, which must load without hf_cl."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(request["checkpoint"])
    tokenizer = AutoTokenizer.from_pretrained(request["checkpoint"])
    found = logits(model, tokenizer, request["rows"], request["max_length"])
    return {"logits": found, "without_hf_cl": "hf_cl" not in sys.modules}


def logits(model: Any, tokenizer: Any, rows: list[dict[str, str]], length: int) -> list[list[float]]:
    """Return float32 logits of texts or pairs in one padded batch."""
    texts = [[row[column] for row in rows] for column in ("text", "text_pair") if column in rows[0]]
    inputs = tokenizer(*texts, truncation=True, max_length=length, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits.float().tolist()


if __name__ == "__main__":
    main()
