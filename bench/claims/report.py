"""The lecture's claims as a section of the report, as a page of its own, and as text."""

from __future__ import annotations

import base64
import importlib
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from types import ModuleType

from dlaccel.bench import summary
from dlaccel.bench.claims import plot
from dlaccel.bench.claims.lab import readable
from dlaccel.bench.claims.row import STATUSES, Row, read, recorded

RESULTS = Path(__file__).resolve().parents[1] / "results"  # rows recorded on GPUs, one folder a device
KIND = {"measured": "measured", "cited": "cited", "projected": "projected", "not_measured": "not measured"}
NOT_TESTED = (
    "near-human vision, speech and handwriting, superhuman Go; AI winters and hype; gradient boosting for tables and deep "
    "learning for perception; support vector machines do not scale to large or perceptual data; shallow means one or two "
    "layers, deep tens to hundreds; back-propagation with convolutions 1989, LSTM 1997, CUDA 2007, networks on it about "
    "2011, take-off 2012; storage, web data, investment; clusters of hundreds of GPUs; Python skills suffice"
)


def modules() -> dict[int, ModuleType]:
    """The experiments by number of their claim."""
    package = importlib.import_module("dlaccel.bench.claims")
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if m.name.startswith("claim")]
    found = [importlib.import_module(f"dlaccel.bench.claims.{name}") for name in names]
    return {module.CLAIM: module for module in sorted(found, key=lambda module: module.CLAIM)}


def draw(rows: Sequence[Row], out: Path) -> dict[int, list[Path]]:
    """The figures of each claim that `rows` has something for; none where matplotlib is absent."""
    if not plot.available():
        return {}
    out.mkdir(parents=True, exist_ok=True)
    figures = {}
    for number, module in modules().items():
        if mine := [row for row in rows if row.claim == number]:
            try:
                figures[number] = module.figures(mine, out)
            except (LookupError, TypeError, ValueError) as error:  # rows of a damaged or of another version's file
                print(f"claim {number}: no figure of these rows ({type(error).__name__}: {error})", file=sys.stderr)
    return figures


def section(folder: Path) -> str:
    """HTML of the claims measured in `folder`/claims.jsonl, beside rows recorded on GPUs. Draws the figures into `folder`.

    Raises FileNotFoundError where there are none, ValueError where recorded rows are damaged.
    """
    rows, _ = read(folder / "claims.jsonl")
    return render(rows, draw([*rows, *recorded(RESULTS)], folder), list(recorded(RESULTS)))


def render(rows: Sequence[Row], figures: Mapping[int, Sequence[Path]], others: Sequence[Row] = ()) -> str:
    """A `<section>` with its style, without script. `others` are measured rows of other machines."""
    parts = [
        f"<style>{STYLE}</style>",
        '<section class="claims" id="claims">',
        "<h2>The lecture's claims</h2>",
        _legend(),
        _glance(rows),
    ]
    for number, module in modules().items():
        mine = [row for row in rows if row.claim == number]
        foreign = [row for row in others if row.claim == number]
        if mine or foreign:
            parts.append(_claim(module, mine, foreign, figures.get(number, ())))
    parts += [f"<h3>Said in the lecture, not tested here</h3><p>{escape(NOT_TESTED)}.</p>", "</section>"]
    return "\n".join(parts)


def _legend() -> str:
    meaning = {
        "measured": "by this program, on the machine, date and load given",
        "cited": "published by the source given",
        "projected": "computed by the formula given from cited numbers; nobody ran it",
        "not_measured": "no number, and why",
    }
    items = "".join(f"<li>{_badge(status)} {meaning[status]}</li>" for status in STATUSES)
    return f'<ul class="legend">{items}</ul>'


def _glance(rows: Sequence[Row]) -> str:
    """One line a claim: the rows that each module names as its headline."""
    lines = []
    for number, module in modules().items():
        mine = [row for row in rows if row.claim == number and row.value is not None]
        firsts = (next((row for row in mine if row.quantity.startswith(start)), None) for start in module.HEADLINES)
        heads = [row for row in firsts if row is not None]
        numbers = "".join(
            f"<li>{escape(row.quantity)}: <b>{value(row)}</b>{escape(f', {against(row)}' if row.ratio else '')} "
            f"{_badge(row.status)}</li>"
            for row in heads
        )
        if heads:
            lines.append(
                f'<tr><th scope="row"><a href="#claim-{number}">{number}. {escape(module.TITLE)}</a></th>'
                f"<td><ul>{numbers}</ul></td></tr>"
            )
    return f'<div class="scroll"><table class="glance">{"".join(lines)}</table></div>' if lines else ""


def _claim(module: ModuleType, rows: Sequence[Row], others: Sequence[Row], figures: Sequence[Path]) -> str:
    ordered = sorted(rows, key=lambda row: STATUSES.index(row.status))
    table = [_line(row) for row in ordered]
    if others:
        table.append('<tr class="divider"><td colspan="5">Recorded on other machines</td></tr>')
        table += [_line(row) for row in others]
    code = f"<pre>{escape(module.CODE)}</pre>" if hasattr(module, "CODE") else ""
    heads = "".join(f"<th>{head}</th>" for head in ("Quantity", "Value", "Against", "Kind", "Where, and from what"))
    return f"""<article class="claim" id="claim-{module.CLAIM}">
<h3>{module.CLAIM}. {escape(module.TITLE)}</h3>
<p><b>The claim.</b> {escape(module.SAYS)}</p>
<p><b>What it compares.</b> {escape(module.COMPARES)}</p>
<p><b>Our reading.</b> {escape(module.READING)}</p>
{"".join(_image(path, module.TITLE) for path in figures)}
<details><summary>All {len(table)} rows</summary><div class="scroll"><table>
<thead><tr>{heads}</tr></thead>
<tbody>{"".join(table)}</tbody></table></div></details>
{code}
</article>"""


def _line(row: Row) -> str:
    where = [row.device, row.time_utc[:10]]
    if row.environment:
        threads = row.environment["threads"]
        where.append(f"{threads} thread{'s' * (threads > 1)}, load {row.environment['load']}")
    source = "" if row.status == "measured" or row.reason else row.source
    about = [", ".join(filter(None, where)), row.reason, row.formula, row.note, source]
    cells = [escape(row.quantity), value(row), escape(against(row)), _badge(row.status), escape("; ".join(filter(None, about)))]
    return f'<tr class="{row.status}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def value(row: Row) -> str:
    """With its unit, its range and, where it is one, the word projected."""
    if row.value is None:
        return "not measured"
    unit = {"of 1": "", "x": " times"}.get(row.unit, f" {row.unit}")
    mark = " projected" if row.status == "projected" else ""
    if row.low is None or row.high is None or row.low == row.high:
        return f"{readable(row.value)}{unit}{mark}"
    spread = f"{readable(row.low)} to {readable(row.high)}"
    # What was published or projected as a range has no middle.
    return f"{readable(row.value)}{unit} ({spread})" if row.status == "measured" else f"{spread}{unit}{mark}"


def against(row: Row) -> str:
    """The ratio; if it is not measured against measured, it says so."""
    if row.ratio is None or row.baseline is None:
        return ""
    mark = "" if row.ratio_status == "measured" else f" ({KIND[row.ratio_status]})"
    return f"{readable(row.ratio)} x {row.baseline.what}{mark}"


def _badge(status: str) -> str:
    return f'<span class="kind {status}">{KIND[status]}</span>'


def _image(path: Path, title: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{escape(title)}" src="data:image/png;base64,{data}"></figure>'


def text(module: ModuleType, rows: Sequence[Row]) -> str:
    """One claim for the terminal."""
    lines = [(row.quantity, value(row), against(row), KIND[row.status], row.reason or row.device) for row in rows]
    heads = ("quantity", "value", "against", "kind", "where")
    return f"{module.CLAIM}. {module.TITLE}\n{summary.table(heads, lines)}"


STYLE = """
.claims { --faint: #666; --line: #ddd; --tint: #f5f6f7; }
@media (prefers-color-scheme: dark) { .claims { --faint: #a0a0a0; --line: #3a3d40; --tint: #1f2225; } }
.claims h3 { margin: 2.5rem 0 .5rem; } .claims p { max-width: 46rem; } .claims a { color: inherit; }
.claims table { border-collapse: collapse; font-size: .85rem; } .claims .scroll, .claims figure { overflow-x: auto; }
.claims th, .claims td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: left; vertical-align: top; }
.claims .divider td { font-weight: 600; padding-top: 1rem; } .claims .glance th { font-weight: 500; }
.claims .glance { width: 100%; } .claims .glance ul { list-style: none; margin: 0; padding: 0; }
.claims figure { margin: 1rem 0; } .claims img { background: #fff; max-width: 100%; min-width: 36rem; }
.claims pre { overflow-x: auto; background: var(--tint); padding: .8rem; font-size: .8rem; }
.claims summary { cursor: pointer; }
.claims .legend { list-style: none; padding: 0; color: var(--faint); font-size: .85rem; }
.claims .kind { border: 1px solid var(--line); border-radius: .6rem; padding: 0 .45rem; font-size: .75rem; }
.claims .kind { white-space: nowrap; }
.claims .kind.measured { background: #0b6e99; border-color: #0b6e99; color: #fff; }
.claims .kind.cited { background: #6f6f6f; color: #fff; } .claims .kind.projected { border: 1px dashed var(--faint); }
.claims .kind.not_measured { color: var(--faint); }
@media (max-width: 40rem) { .claims .glance th, .claims .glance td { display: block; border: 0; } }
"""
PAGE_STYLE = """
:root { color-scheme: light dark; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; }
body { color: #1c1c1c; background: #fff; }
@media (prefers-color-scheme: dark) { body { color: #e6e6e6; background: #16181a; } }
"""


def page(body: str) -> str:
    """One file: no network, no script."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>dlaccel: the lecture's claims</title><style>{PAGE_STYLE}</style></head>
<body><h1>dlaccel</h1>
{body}
</body></html>
"""
