"""The README of an adapter's folder: what it is, and the import without which PEFT answers `KeyError: 'HFCL'`.

PEFT writes a card that says nothing of this, and the Hub shows a snippet by its `library_name`. A card that its
owner has written is kept: our section stands between two marks in it.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

START, END = "<!-- hf_cl: begin -->", "<!-- hf_cl: end -->"
_EMPTY = "[More Information Needed]"
"""What PEFT's own template is full of."""


def write_cards(config: Any, folder: Path, adapter: str) -> None:
    """Write the card of one saved adapter, and that of the folder around it where the adapter has a name.

    Args:
        config: The adapter's `MaskConfig`.
        folder: Where its `adapter_config.json` lies.
        adapter: Its name; PEFT puts any but `default` into a folder of its name.
    """
    around = folder if adapter == "default" else folder.parent
    if adapter != "default":
        _write(folder / "README.md", config, _section(config, adapter, None))
    if adapter == "default" or (folder.name == adapter and (around / "README.md").is_file()):
        names = sorted(file.parent.name for file in around.glob("*/adapter_config.json"))
        places: list[tuple[str, str | None]] = [(name, name) for name in names]
        if (around / "adapter_config.json").is_file():
            places.insert(0, ("default", None))
        _write(around / "README.md", config, "\n\n".join(_section(config, *place) for place in places))


def _write(file: Path, config: Any, section: str) -> None:
    marked = f"{START}\n{section}\n{END}"
    card = ModelCard.load(file) if file.is_file() else None
    if card is None or _EMPTY in card.text:
        card = ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n\n{marked}\n")
    elif START in card.text and END in card.text:
        card.text = card.text[: card.text.index(START)] + marked + card.text[card.text.rindex(END) + len(END) :]
    else:
        card.text = f"{card.text.rstrip()}\n\n{marked}\n"
    data: Any = card.data
    data.library_name, data.pipeline_tag = "hf_cl", "text-classification"
    # PEFT tags the base's path, also where it is a folder of this machine.
    tags = [tag for tag in data.tags or () if not Path(tag.removeprefix("base_model:adapter:")).is_absolute()]
    data.tags = sorted({*tags, "hf_cl", "continual-learning"})
    base = config.base_model_name_or_path
    if isinstance(data.base_model, str) and Path(data.base_model).exists():
        data.base_model = data.base_model_relation = None  # PEFT writes a folder of this machine there
    if base and not Path(base).exists():
        data.base_model, data.base_model_relation = base, "adapter"
    card.save(file)


def _section(config: Any, adapter: str, subfolder: str | None) -> str:
    base = config.base_model_name_or_path or "the base"
    where = f", subfolder={json.dumps(subfolder)}" if subfolder else ""
    about = f"`{adapter}`: a masked adapter of the package hf-cl on `{base}`"
    if subfolder is None and config.saved_as == adapter:
        labels = ", ".join(" ".join(label.split()) for label in config.labels)
        about += f", task number {config.task_index}, with the labels {labels}"
    return f"""{about}.

```python
import hf_cl.tuner  # registers the method; without it PEFT raises KeyError: 'HFCL'
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

base = AutoModelForSequenceClassification.from_pretrained({json.dumps(base)})
model = PeftModel.from_pretrained(base, "THIS_REPOSITORY"{where}, adapter_name={json.dumps(adapter)})
```"""
