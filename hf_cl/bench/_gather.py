"""Several benchmarks in one file: `benchmarks.json`, its rows kept when other benchmarks are run."""

import json
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_cl import plugins
from hf_cl.bench._measure import load, machine
from hf_cl.bench._page import write_page
from hf_cl.bench._row import MODELS, Row, Settings, Tell
from hf_cl.config import did_you_mean
from hf_cl.errors import ConfigError, HfClError
from hf_cl.plots import new_figure
from hf_cl.storage.disk import json_bytes, write_atomic

FOLDER, FILE, PAGE = "bench", "benchmarks.json", "index.html"
FORMAT = 1
DEVICES = ("cpu", "cuda")
Record = dict[str, Any]
KEYS = set(Row("", "", {}, 0.0, "", "").record({}, quick=True))
"""What every row of the file has."""


def bench(names: Sequence[str], settings: Settings, out: Path, tell: Tell) -> tuple[dict[str, Any], dict[str, str]]:
    """Run benchmarks; write their rows beside earlier ones' into `out/benchmarks.json`, and a page of all of them.

    The file is written after each benchmark. New rows take the place of their benchmark's earlier ones that were
    measured with the same model on the same device. One that fails leaves the file as it was; the others go on.

    Args:
        names: Files in `hf_cl/bench`; none are all.
        settings: What is asked of them.
        out: The folder.
        tell: Told a line for each thing that takes long, and each row.

    Returns:
        What the file holds, and what went wrong, by benchmark.

    Raises:
        ConfigError: There is no such benchmark, model or device, or matplotlib is missing.
        HfClError: `benchmarks.json` in the folder is something else.
    """
    known = plugins.available(FOLDER)
    asked = list(dict.fromkeys(names)) or list(known)
    require(settings)
    modules = {name: plugins.load(FOLDER, name) for name in asked}
    new_figure(1, 1)  # a missing matplotlib shows before anything is measured
    records, failed = read_rows(out / FILE), dict[str, str]()
    out.mkdir(parents=True, exist_ok=True)
    for place, (name, module) in enumerate(modules.items(), start=1):
        tell(f"[{place}/{len(modules)}] {name}")
        try:
            found = measure(name, module, settings, tell)
        except Exception as error:  # whatever it is, hours of the others' work shall not be lost to it
            failed[name] = str(error) if isinstance(error, HfClError) else f"{type(error).__name__}: {error}"
            tell("".join(traceback.format_exception(error)))
            continue
        records = merged(records, found)
        write_atomic(out / FILE, json_bytes({"format": FORMAT, "rows": records}))
    if records:
        write_page(out / PAGE, records)
    return {"format": FORMAT, "rows": records}, failed


def require(settings: Settings) -> None:
    """Refuse a model or a device that there is not.

    Raises:
        ConfigError: It says which there are.
    """
    if settings.asked is not None and settings.asked not in MODELS:
        raise ConfigError(f"--model: there is no {settings.asked!r}.{did_you_mean(settings.asked, MODELS)}")
    if settings.device not in DEVICES:
        raise ConfigError(f"--device: there is no {settings.device!r}.{did_you_mean(settings.device, DEVICES)}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no such device here. Take cpu, or install torch for CUDA.")


def require_done(failed: Mapping[str, str]) -> None:
    """Raise where a benchmark failed, naming each.

    Raises:
        HfClError: With what went wrong; the rows of the others are kept.
    """
    if failed:
        said = "; ".join(f"{name} failed: {error}" for name, error in failed.items())
        raise HfClError(f"bench: {said} All other rows are in {FILE}.")


def measure(name: str, module: Any, settings: Settings, tell: Tell) -> list[Record]:
    """Run one benchmark and return its rows as JSON values, each with the machine it was measured on."""
    rows, here = [], machine(settings.device)
    for row in module.run(settings, lambda line: tell(f"{name}: {line}")):
        rows.append(row)
        tell(f"{name}: {line_of(row.record({}, quick=settings.quick))}")
    here["load_after"] = load()
    return [row.record(here, quick=settings.quick) for row in rows]


def line_of(record: Mapping[str, Any]) -> str:
    """Return a row as one line."""
    under = ", ".join(f"{key} {value}" for key, value in record["settings"].items())
    said = f"{record['what']} ({under}): {record['value']:.4g} {record['unit']}"
    if record["ratio"] is not None:
        said += f", {record['ratio']:.3f} of {record['rival']}"
    if record["mark"] is not None:
        met = {True: "met", False: "missed", None: "not judged"}[record["met"]]
        said += f"; mark {record['mark']['text']}: {met}"
    return said


def merged(held: Sequence[Record], new: Sequence[Record]) -> list[Record]:
    """Return earlier rows and new ones, by benchmark; new ones replace those of their benchmark, model and device.

    A quick run's rows are figures of nothing: they give way to any other row of their benchmark, and replace none.
    """
    taken = {_place(record) for record in new}
    real = {record["benchmark"] for record in new if not record["quick"]}
    kept = [
        record
        for record in held
        if _place(record) not in taken and not (record["quick"] and record["benchmark"] in real)
    ]
    return sorted([*kept, *new], key=lambda record: str(record["benchmark"]))


def _place(record: Record) -> tuple[Any, ...]:
    under = record["settings"]
    return record["benchmark"], under.get("model"), under.get("device"), record["quick"]


def read_rows(file: Path) -> list[Record]:
    """Return the rows of an earlier run; none where there is no file.

    Raises:
        HfClError: The file is none of `hf-cl bench`.
    """
    if not file.exists():
        return []
    try:
        content = json.loads(file.read_text("utf-8"))
        if content["format"] != FORMAT or not isinstance(content["rows"], list):
            raise ValueError(f"format {content['format']}")
        for record in content["rows"]:
            if set(record) != KEYS:
                raise ValueError(f"a row has {', '.join(sorted(KEYS ^ set(record)))} too much or not at all")
        return list(content["rows"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HfClError(f"{file}: holds no rows of `hf-cl bench` ({error}). Give another --out.") from error
