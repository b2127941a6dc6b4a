"""The rows of `benchmarks.json` as a page: marks and ratios as pictures, every row in a table."""

import ast
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_cl import plugins
from hf_cl.plots import INK, PAPER, QUIET, new_figure, save_figure, shortened
from hf_cl.report.axes import COLOURS, frame
from hf_cl.report.document import document, picture
from hf_cl.report.tables import table
from hf_cl.report.words import NONE, escaped, plain, safe
from hf_cl.storage.disk import write_atomic

WIDTH, MOST, LONGEST = 10.4, 40, 78
"""Inches of a picture, rows that one shows, and signs of a row's name in it."""
MET, MISSED, UNJUDGED = (COLOURS[0], "o"), (COLOURS[1], "X"), (COLOURS[6], "D")
"""Colour and marker of a row; the words beside it say the same."""
JUDGED = {True: ("met", MET), False: ("missed", MISSED), None: (NONE, UNJUDGED)}
GLOSSARY = {
    "ratio": "Ours by the rival's, both taken in turns in one run: the median over turns, and its quartiles.",
    "mark": "What the ratio, or the figure, is held against. A quick run shrinks all sizes and judges none.",
    "floor": "The least that it could be, as the benchmark derives it; docs/benchmarks.md says how.",
    "load": "Processes that ran or waited on the machine before and after: far above 0 before, and figures are rough.",
}
Record = Mapping[str, Any]


def write_page(file: Path, records: Sequence[Record]) -> None:
    """Write the page; its pictures are inside.

    Raises:
        ConfigError: matplotlib is missing.
    """
    names = list(dict.fromkeys(str(record["benchmark"]) for record in records))
    with tempfile.TemporaryDirectory() as scratch:
        marked = [record for record in records if record["mark"] is not None]
        main = _marks(marked, Path(scratch) / "marks.png") if marked else ""
        for place, name in enumerate(names, start=1):
            rows = [record for record in records if record["benchmark"] == name]
            main += _section(f"b{place}", name, rows, Path(scratch) / f"{place}.png")
    judged = [record["met"] for record in records if record["met"] is not None]
    lead = f"{len(records)} rows, {sum(judged)} of {len(judged)} marks met."
    links = "".join(f'<li><a href="#b{place}">{safe(name)}</a></li>' for place, name in enumerate(names, start=1))
    header = (
        f'<h1>What hf_cl costs</h1>\n<p class="lead">{lead}</p>\n<nav aria-label="Benchmarks"><ul>{links}</ul></nav>'
    )
    glossary = "".join(f"<dt>{safe(term)}</dt><dd>{text}</dd>" for term, text in GLOSSARY.items())
    footer = f"<h3>How to read this</h3>\n<dl>{glossary}</dl>\n"
    footer += '<p class="note">Made by <code>hf-cl bench</code> from benchmarks.json.</p>'
    write_atomic(file, document("What hf_cl costs", "hf-cl bench", header, main, footer).encode())


def _marks(marked: Sequence[Record], png: Path) -> str:
    """Return the picture of every marked row, as a share of its mark: left of the line is good."""
    shown = [(record, [share]) for record in marked if (share := _of_mark(record)) is not None][:MOST]
    if not shown:
        return ""
    _draw(shown, png, "share of the mark (1 is the mark, less is better; log)")
    words = "; ".join(
        f"{name}: {shares[0]:.3g}, {_met(record)}"
        for name, (record, shares) in zip(_names([record for record, _ in shown]), shown, strict=True)
    )
    caption = "Each row's figure by its mark, turned over where more is better. Crosses miss, diamonds are not judged."
    return picture(png, "Against the marks", words, caption, "h2")


def _of_mark(record: Record) -> float | None:
    mark = record["mark"]
    figure = record[mark["of"]]
    if not figure or not mark["limit"]:
        return None
    share = mark["limit"] / figure if mark["direction"].startswith(">") else figure / mark["limit"]
    return float(share)


def _section(place: str, name: str, rows: Sequence[Record], png: Path) -> str:
    whole = [record for record in rows if record["ratio"]]
    shown = whole if len(whole) <= MOST else [record for record in whole if record["mark"] is not None][:MOST]
    drawn = ""
    if shown:
        _draw([(record, [record["ratio"], *(record["quartiles"] or ())]) for record in shown], png, "ratio (log)")
        words = "; ".join(f"{name}: {record['ratio']:.3g}" for name, record in zip(_names(shown), shown, strict=True))
        caption = "A point is the median ratio to the rival, its line reaches from quartile to quartile."
        drawn = picture(png, "Ours by the rival's", words, caption)
    columns = ["", "under", "ours", "rival", "rival's", "ratio", "quartiles", "mark", "", "floor"]
    machines = list(dict.fromkeys(_machine(record) for record in rows))
    said = "".join(f'<p class="conditions">{safe_line}</p>' for safe_line in machines)
    quick = '<p class="note">A quick run: sizes are shrunk, no figure means anything.</p>' if _quick(rows) else ""
    return f"""<section id="{place}" aria-labelledby="{place}-name">
<h2 id="{place}-name">{safe(name)} <small>{escaped(_summary(name))}</small></h2>
{said}{quick}{drawn}
{table("Every row", columns, [_cells(record) for record in rows], text=True)}
</section>
"""


def _quick(rows: Sequence[Record]) -> bool:
    return any(record["quick"] for record in rows)


def _cells(record: Record) -> list[str]:
    between = "" if record["quartiles"] is None else " to ".join(_figure(value) for value in record["quartiles"])
    return [
        safe(record["what"]),
        safe(_under(record)),
        f"{_figure(record['value'])} {safe(record['unit'])}",
        safe(record["rival"]) if record["rival"] else NONE,
        _figure(record["theirs"]),
        _figure(record["ratio"]),
        between or NONE,
        safe(record["mark"]["text"]) if record["mark"] else NONE,
        _met(record),
        escaped(record["floor"]),
    ]


def _met(record: Record) -> str:
    return JUDGED[record["met"]][0] if record["mark"] is not None else NONE


def _figure(value: float | None) -> str:
    """Return a figure with four digits."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _under(record: Record) -> str:
    return ", ".join(f"{key} {plain(value)}" for key, value in record["settings"].items())


def _names(records: Sequence[Record]) -> list[str]:
    """Return what tells rows from each other: what is measured, the settings that vary in its benchmark, the rival."""
    varies: dict[str, set[str]] = {}
    for one in records:
        for other in records:
            if one["benchmark"] == other["benchmark"]:
                held, theirs = one["settings"], other["settings"]
                found = {key for key in {*held, *theirs} if held.get(key) != theirs.get(key)}
                varies.setdefault(one["benchmark"], set()).update(found)
    names = []
    for record in records:
        under = [plain(value) for key, value in record["settings"].items() if key in varies[record["benchmark"]]]
        rival = f" / {record['rival']}" if record["ratio"] is not None else ""
        names.append(f"{record['benchmark']}: {', '.join([record['what'], *under])}{rival}")
    return names


def _machine(record: Record) -> str:
    here = dict(record["machine"])
    versions = " · ".join(f"{safe(key)} {safe(value)}" for key, value in here.pop("versions", {}).items())
    own = " · ".join(f"{safe(key.replace('_', ' '))} <b>{safe(value)}</b>" for key, value in here.items())
    return f"{own} · {versions}"


def _summary(name: str) -> str:
    """Return the first line of a benchmark's docstring; nothing for one that is no longer there."""
    if name not in plugins.available("bench"):
        return ""
    source = (plugins.ROOT / "bench" / f"{name}.py").read_text("utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def _draw(rows: Sequence[tuple[Record, Sequence[float]]], png: Path, below: str) -> None:
    """Draw a row a figure on a logarithmic axis: a point, and a line from quartile to quartile where they are given."""
    drawn = new_figure(WIDTH, 1.0 + 0.27 * len(rows))
    axes = drawn.subplots()
    for place, (record, (middle, *ends)) in enumerate(rows):
        colour, marker = JUDGED[record["met"]][1]
        if len(ends) == 2 and min(ends) > 0:
            axes.plot(ends, [place, place], color=colour, linewidth=2, alpha=0.5)
        axes.plot([middle], [place], marker, color=colour, markersize=7, markeredgecolor=PAPER)
        look = {"xytext": (9, 0), "textcoords": "offset points", "fontsize": 8, "color": INK, "va": "center"}
        axes.annotate(f"{middle:.3g}", (max([middle, *ends]), place), **look)
    axes.axvline(1.0, color=QUIET, linewidth=1.5, zorder=0)
    values = [value for _, figures in rows for value in figures if value > 0] + [1.0]
    axes.set_xscale("log")
    span = max(math.log10(max(values) / min(values)), 0.3)
    low, high = min(values) / 10 ** (0.06 * span), max(values) * 10 ** (0.16 * span)
    axes.set_xlim(low, high)
    steps = (1, 2, 5) if span < 2.5 else (1,)
    ticks = [step * 10.0**power for power in range(-9, 10) for step in steps]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    names = [shortened(plain(name), LONGEST) for name in _names([record for record, _ in rows])]
    axes.set_yticks(range(len(rows)), names, parse_math=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    frame(axes, below)
    axes.tick_params(axis="y", labelsize=7.5)
    save_figure(drawn, png)
