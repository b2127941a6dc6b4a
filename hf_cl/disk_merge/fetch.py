"""Find what is to be merged: a folder of this machine, or a repository of the Hub through the client's cache."""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from hf_cl.disk_merge.carry import TOKENIZER
from hf_cl.errors import MergeError
from hf_cl.layers.base import packaged
from hf_cl.storage.hub_requests import FAILURES, patiently, refusal

_WANTED = ["*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json", *TOKENIZER]
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Source:
    """What is merged.

    Attributes:
        name: What the caller named it by: a folder or a Hub id.
        folder: Where its files lie.
        commit: The commit that they are of; None for a folder.
    """

    name: str
    folder: Path
    commit: str | None = None


def fetch(where: str | Path) -> Source:
    """Return a source whose files lie on this machine; `HF_HUB_OFFLINE` is honoured.

    A model that an installed package carries (the extra `offline`) comes from there.

    Raises:
        MergeError: It is no folder, and no repository that the Hub gives.
    """
    text = str(where)
    if Path(where).is_dir():
        return Source(text, Path(where))
    if (held := packaged(text)) is not None:
        return Source(text, Path(held))
    try:
        if isinstance(where, Path) or Path(where).exists():
            raise HFValidationError("it is a path")
        validate_repo_id(text)
    except HFValidationError as error:
        raise MergeError(
            f"{text!r}: is no folder here, and no repository of the Hub is called so. Give the folder of a checkpoint, "
            f"or a repository as in 'name/model'."
        ) from error
    try:
        folder = Path(patiently(lambda: snapshot_download(text, allow_patterns=_WANTED)))
    except FAILURES as error:
        raise MergeError(str(refusal(error, text, None))) from error
    return Source(text, folder, folder.name if _COMMIT.fullmatch(folder.name) else None)
