"""What every rank of a job does in tests/test_ranks.py; each function returns a JSON value."""

import logging
from pathlib import Path

import jobs
import tiny
import torch
from torch.utils.data import DataLoader
from transformers import Trainer

import hf_cl.training.train_task
from hf_cl import ranks
from hf_cl.data import collator, tokenise
from hf_cl.training.agreement import Agreement
from hf_cl.training.evaluation import evaluate
from hf_cl.training.kkt_start import _features, batches_of, order_of
from hf_cl.training.ownership_callback import OwnershipCallback
from hf_cl.tuner import MaskConfig


def error_of(action) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def basics():
    """Ask each function of hf_cl.ranks once."""
    ranks.join(cpu=True, timeout=60)
    mine = ranks.rank()

    def fail():
        raise OSError(28, "No space left on device", "file")

    def slow():
        for _ in range(3):
            ranks.beat()
        return "done"

    alone = []
    found = {
        "world": ranks.world(),
        "broadcast": ranks.broadcast(["of", mine]),
        "gather": ranks.gather(mine * 10),
        "any": ranks.any_rank([False, mine == 1, mine == 0]),
        "first": ranks.on_first(lambda: alone.append(mine) or f"of {mine}"),
        "nested": ranks.on_first(lambda: [ranks.world(), ranks.on_first(lambda: mine), ranks.gather(mine)]),
        "slow": ranks.on_first(slow),
        "failed": error_of(lambda: ranks.on_first(fail)),
        "equal": error_of(lambda: ranks.require_equal({"a": "1", "b": "2"}, "now")),
        "different": error_of(lambda: ranks.require_equal({"a": "1", "b": str(mine), "c": str(mine)}, "at step 4")),
        "lacking": error_of(lambda: ranks.require_equal({"a": "1"} if mine else {"a": "1", "b": "2"}, "now")),
        "after": ranks.gather(mine),
    }
    return found | {"alone": alone, "environment": sorted({"RANK", "WORLD_SIZE"} & set(ranks.environment()))}


def train_without_hook(*order):
    """Train as a job does, but let DDP reduce all gradients by itself."""
    hf_cl.training.train_task.reducing = lambda trainer_class, reduction: trainer_class
    return jobs.train(*order)


def other_heads(base: str, folder: str, method: str):
    """Learn a task on a base whose own head is another on each rank, as where its checkpoint has none."""
    ranks.join(cpu=True, timeout=60)
    loaded = tiny.fresh(Path(base))
    torch.nn.init.normal_(loaded.model.classifier.weight, generator=torch.Generator().manual_seed(ranks.rank()))
    own = ranks.gather(loaded.model.classifier.weight.sum().item())
    made = tiny.learner(loaded, tiny.options(method), Path(folder) / f"{ranks.rank()}")
    return [own[0] == own[1], made.learn(tiny.task("pets"))["parts"]]


def masked(base: str, folder: str):
    """Return a learner that has learned one task, without evaluating more than its rows."""
    options = tiny.options("exssnet")
    made = tiny.learner(Path(base), options, Path(folder) / f"{ranks.rank()}", training={"ddp_timeout": 60})
    made.learn(tiny.task("pets", sizes={"train": 24, "validation": 5, "test": 11}))
    return made


def measured(base: str, folder: str):
    """Train, measure and ask for features; what comes out must be the same on all ranks."""
    ranks.join(cpu=True, timeout=60)
    learner = masked(base, folder)
    task = tiny.task("weather", sizes={"train": 23, "validation": 5, "test": 13})
    rows = tokenise(task, learner.base.tokenizer, 8)
    loader = DataLoader(rows["train"], batch_size=4, collate_fn=collator(learner.base.tokenizer))
    tuner = learner.method.tuner
    batches = batches_of(loader, order_of(loader, 0, 1)[:22])
    features = _features(tuner, "task0", batches, torch.device("cpu"))
    alone = ranks.on_first(lambda: _features(tuner, "task0", batches, torch.device("cpu")))
    found = evaluate(learner.model, rows["test"].remove_columns("labels").add_column("labels", [0, 1] * 6 + [0]),
                     collator(learner.base.tokenizer), learner.args)  # fmt: skip
    return {
        "correct": learner.correct["pets"].tolist(),
        "other": found.correct.tolist(),
        "accuracy": found.metrics["accuracy"],
        "features": [list(features.shape), torch.equal(features, alone)],
        "parts": learner.records[0]["parts"],
    }


def own_trainer(base: str, folder: str):
    """Train with a user's own Trainer, whose arguments leave DDP's buffers on; return what was logged."""
    ranks.join(cpu=True, timeout=60)
    held = []
    handler = logging.Handler()
    handler.emit = lambda record: held.append(record.getMessage())
    logging.getLogger("hf_cl.training.guards").addHandler(handler)
    from peft import get_peft_model

    from hf_cl.layers.base import load_base

    def train(seed, **changes):
        loaded = load_base(base)
        model = get_peft_model(loaded.model, MaskConfig(density=0.3, num_labels=2, seed=seed), adapter_name="pets")
        args = tiny.arguments(Path(folder) / f"{ranks.rank()}", max_steps=2, **changes)
        rows = tokenise(tiny.task("pets"), loaded.tokenizer, 8)
        hooks = [Agreement(), OwnershipCallback("pets", learning_rates={"scores": 0.05})]
        Trainer(model, args, train_dataset=rows["train"], data_collator=collator(loaded.tokenizer),
                callbacks=hooks).train()  # fmt: skip
        return model.base_model.phase("pets")

    phases = [train(0, ddp_broadcast_buffers=False)]
    quiet = list(held)
    phases.append(train(0))
    unlike = error_of(lambda: train(ranks.rank()))
    options = error_of(lambda: train(0, weight_decay=0.1 * ranks.rank()))
    return {"phases": phases, "quiet": quiet, "warned": held, "unlike": unlike, "options": options}
