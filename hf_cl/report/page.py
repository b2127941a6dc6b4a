"""The report: one HTML file with its pictures inside, and the same pictures as PNGs beside it."""

import re
from collections.abc import Sequence
from pathlib import Path

from hf_cl.errors import ConfigError
from hf_cl.plots import new_figure
from hf_cl.report.axes import styles
from hf_cl.report.document import document, picture
from hf_cl.report.groups import Group, group
from hf_cl.report.pictures import Picture, draw
from hf_cl.report.read import Result, read_results
from hf_cl.report.tables import accuracies, conditions, differences, figures, methods, sources
from hf_cl.report.words import safe
from hf_cl.storage.disk import write_atomic

GLOSSARY = {
    "average accuracy": "Mean accuracy over all tasks after the last one was learned, each task with its own head.",
    "learning accuracy": "Mean of each task's accuracy right after it was learned.",
    "forgetting": "Mean over earlier tasks of (best so far less last). 0 is none; a negative figure is a gain.",
    "± and interval": "± is the standard deviation over seeds. The 95 % interval of the mean (Student's t) is given "
    "from three seeds on. A single seed fills a row and supports no claim that one method beats another.",
    "paired by test row": "A bootstrap of 10,000 draws over the rows of each task, the same rows for both, meant over "
    "the seeds that both have. An interval that holds 0 shows no difference.",
    "exact": "Measured, never declared: digests of all that each task's forward reads, and probe logits, recomputed "
    "from the saved files in a fresh process, equal those taken when the task was finished.",
    "bytes": "On disk, as saved: what a task adds, its head, and what all tasks share. Carried is what only "
    "learning the next task needs, of all tasks: texts to replay, encoders to merge, a penalty's centre.",
    "tuned": "Chosen on validation rows of the stream's first tasks, by the grid that is shown.",
    "time": "Seconds of training as they passed on the machine of that run. Not a benchmark.",
}


def write_report(runs: Sequence[Path], out: Path) -> list[Group]:
    """Write a report of runs: one HTML file, and its pictures in a folder `<name>_pictures` beside it.

    Args:
        runs: Run folders, result files, or folders of such.
        out: The file, `.html`.

    Returns:
        The groups that were compared, in the page's order.

    Raises:
        RunError: A path holds no finished run, or a file is no result.
        ConfigError: `out` is no `.html`, or matplotlib is missing.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {out}: a report is a page. Give a name that ends in .html.")
    results = read_results(runs)
    new_figure(1, 1)  # a missing matplotlib shows before anything is written
    groups = group(results)
    folder = out.with_name(f"{out.stem}_pictures")
    folder.mkdir(parents=True, exist_ok=True)
    style = styles(groups)
    sections = [
        _section(place, part, draw(part, folder, f"{place:02d}-{_slug(part.stream)}", style))
        for place, part in enumerate(groups, start=1)
    ]
    write_atomic(out, _page(groups, results, sections, folder.name).encode())
    return groups


def _slug(name: str) -> str:
    """Return a name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", name)[:40].strip("-") or "stream"


def _page(groups: Sequence[Group], results: Sequence[Result], sections: Sequence[str], folder: str) -> str:
    streams = list(dict.fromkeys(part.stream for part in groups))
    methods_ = list(dict.fromkeys(series.method for part in groups for series in part.series))
    counts = [(len(results), "run"), (len(streams), "stream"), (len(methods_), "method")]
    lead = ", ".join(f"{count} {word}{'' if count == 1 else 's'}" for count, word in counts)
    validation = any(result.split != "test" for result in results)
    apart = "Runs with other settings than their stream's stand apart: figures are only comparable within a section."
    glossary = "".join(f"<dt>{safe(term)}</dt><dd>{text}</dd>" for term, text in GLOSSARY.items())
    warning = (
        "<p>Some runs were measured on validation rows, by which options are chosen. They are no final figures.</p>"
        if validation
        else ""
    )
    header = f"""<h1>Continual learning, compared</h1>
<p class="lead">{lead}. {apart if len(groups) > len(streams) else ""}</p>
{warning}{_contents(groups)}"""
    footer = f"""<h3>How to read this</h3>
<dl>{glossary}</dl>
<p class="note">Made by <code>hf-cl report</code> from results.json files; the pictures lie in {safe(folder)}, too.</p>
"""
    title = f"Continual learning: {', '.join(streams)}"
    return document(title, "hf-cl report", header, "".join(sections), footer.rstrip())


def _contents(groups: Sequence[Group]) -> str:
    if len(groups) < 2:
        return ""
    links = "".join(f'<li><a href="#g{place}">{_name(part)}</a></li>' for place, part in enumerate(groups, start=1))
    return f'<nav aria-label="Streams"><ul>{links}</ul></nav>'


def _name(part: Group) -> str:
    return safe(part.stream) + (f" <small>with {safe(part.differs)}</small>" if part.differs else "")


def _section(place: int, part: Group, pictures: Sequence[Picture]) -> str:
    whole, half, matrix = (
        "".join(_figure(drawn) for drawn in pictures if drawn.kind == kind) for kind in ("whole", "half", "matrix")
    )
    return f"""<section id="g{place}" aria-labelledby="g{place}-name">
<h2 id="g{place}-name">{_name(part)}</h2>
{conditions(part)}
{figures(part)}
{differences(part)}
{whole}
<div class="pair gap">{half}</div>
<h3>Accuracy on every task, after every task</h3>
<p class="note">Bold is just learned. A column that stays as it is has lost nothing. Colours run from 0 to 1.</p>
<div class="pair">{matrix}</div>
{accuracies(part)}
{methods(part)}
{sources(part)}
</section>
"""


def _figure(drawn: Picture) -> str:
    level = "h4" if drawn.kind == "matrix" else "h3"
    return picture(drawn.path, drawn.title, drawn.alt, drawn.caption, level)
