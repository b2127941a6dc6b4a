"""The card of a merged model: rule, options, weights and sources; and the same for machines, in `merge.json`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

import hf_cl
from hf_cl.disk_merge.fetch import Source
from hf_cl.storage.bank_card import README, shown
from hf_cl.storage.disk import json_bytes

RECORD, FORMAT = "merge.json", 1
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def record(
    rule: str, options: Mapping[str, Any], base: Source | None, models: Sequence[Source], heads: str
) -> dict[str, Any]:
    """Return what was merged and how, as JSON values; paths of this machine are shortened to their last part."""
    weights = options.get("weights") or [None] * len(models)
    return {
        "format": FORMAT,
        "hf_cl": hf_cl.__version__,
        "rule": rule,
        "options": {name: value for name, value in options.items() if name != "weights"},
        "base": None if base is None else _named(base),
        "models": [{**_named(model), "weight": weight} for model, weight in zip(models, weights, strict=True)],
        "heads": heads,
    }


def write_card(
    folder: Path, found: Mapping[str, Any], *, library: str, folders: Sequence[str] = (), base: str | None = None
) -> None:
    """Write the card and the record into a folder.

    Args:
        folder: Where.
        found: What `record` returned.
        library: What loads the result, `transformers` or `peft`.
        folders: Where each model's head is kept, if it is.
        base: Hub id of the base that adapters name; a folder is not told of.
    """
    sources = [source for source in (found["base"], *found["models"]) if source is not None]
    held = {source["name"] for source in sources if source["commit"]}
    if base is not None and not Path(base).exists() and REPO.fullmatch(base):
        held.add(base)
    data = ModelCardData(
        library_name=library,
        base_model=sorted(held) or None,
        base_model_relation="merge" if held else None,
        tags=["merge", "hf_cl", "continual-learning"],
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {shown(found['rule'])}\n\n{_text(found, folders)}\n")
    (folder / README).write_text(str(card), "utf-8")
    (folder / RECORD).write_bytes(json_bytes(found))


def _named(source: Source) -> dict[str, Any]:
    name = source.folder.absolute().name if Path(source.name).is_dir() else source.name
    return {"name": name, "commit": source.commit}


def _text(found: Mapping[str, Any], folders: Sequence[str]) -> str:
    options = "".join(f"- {name}: `{value}`\n" for name, value in found["options"].items())
    rows = [("base", found["base"], None, "")] if found["base"] else []
    places = folders or [""] * len(found["models"])
    rows += [("model", model, model["weight"], place) for model, place in zip(found["models"], places, strict=True)]
    lines = [f"| {part} | {_shown(source)} | {_weight(weight)} | {place} |" for part, source, weight, place in rows]
    heads = {
        "base": "The base's head, if it has one, is kept as it is.",
        "each": "Each model's head is kept, with the merged encoder, in the folder that the table names.",
        "merge": "Heads are merged like all other weights.",
    }
    return (
        f"Merged by the rule `{found['rule']}` of hf_cl {found['hf_cl']}, in float32, from the weights of these "
        f"checkpoints; nothing was trained or measured.\n\n{options}\n"
        "| | source | weight | folder |\n|---|---|---|---|\n" + "\n".join(lines) + f"\n\n{heads[found['heads']]}"
    )


def _shown(source: Mapping[str, Any]) -> str:
    at = f" at {source['commit'][:12]}" if source["commit"] else ""
    return f"{shown(source['name'])}{at}"


def _weight(weight: float | None) -> str:
    return "" if weight is None else f"{weight:g}"
