"""One HTML page from the rows: opens from disk, needs no network and no JavaScript. The figures also as PNG files beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dlaccel.bench import figures, kernel_times, results, summary, verify
from dlaccel.bench.results import Row

RECORDED = Path(__file__).parent / "results"  # rows of other machines that come with dlaccel


@dataclass
class Figure:
    title: str
    svg: str
    png: str


@dataclass
class Machine:
    """What was measured on one machine."""

    name: str
    facts: list[tuple[str, str]]
    counts: str
    tiles: list[summary.Mean]  # dlaccel's training steps, or whatever there is
    means: list[tuple[str, str, str]]
    losses: list[tuple[str, ...]]
    undecided: list[tuple[str, ...]]
    untimed: list[tuple[str, ...]]
    table: list[tuple[str, tuple[str, ...]]]  # (kind of verdict, cells)
    figures: list[Figure] = field(default_factory=list)


def machine(name: str, rows: Sequence[Row], folder: Path, prefix: str) -> Machine:
    """Figures go to `folder` under names that start with `prefix`."""
    rows = sorted(rows, key=summary.order)
    shown = [row for row in rows if row.provider != "eager" or not row.timed]
    means = summary.geometric_means(rows)
    ours = [replace(mean, what=mean.what.removeprefix("dlaccel: ")) for mean in means if mean.what.startswith("dlaccel: ")]
    count = Counter(row.status for row in shown)
    return Machine(
        name=name,
        facts=facts(rows),
        counts=", ".join(f"{count[status]} {status}" for status in results.STATUSES if count[status]),
        tiles=[mean for mean in ours if " train " in mean.what and "default allocator" not in mean.what] or ours,
        means=[(mean.what, mean.text, mean.of) for mean in means],
        losses=[summary.cells(row) for row in summary.losses(rows)],
        undecided=[summary.cells(row) for row in summary.undecided(rows)],
        untimed=[
            (*summary.cells(row)[:4], summary.verdict(row)) for row in shown if row.status in ("failed", "refused", "suspect")
        ],
        table=[(_kind(row), summary.cells(row)) for row in shown if row.status != "unavailable"],
        figures=list(draw(rows, folder, prefix)),
    )


def _kind(row: Row) -> str:
    return summary.verdict(row).split(":")[0].lower()


def facts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Machine, versions, commit and date, each with all its values."""

    def all_of(name: str) -> str:
        return ", ".join(sorted({str(getattr(row, name)) for row in rows} - {""}))

    loads = [row.load for row in rows]
    times = sorted(row.time_utc[:16].replace("T", " ") for row in rows if row.time_utc)
    commits = sorted({row.git_sha[:12] + (" with local changes" if row.git_dirty else "") for row in rows if row.git_sha})
    found = {
        "GPU": all_of("gpu"), "driver": all_of("driver"), "CPU": all_of("cpu"), "threads": all_of("threads"),
        "clock": all_of("clock"), "allocator": all_of("allocator"),
        "load average": f"{min(loads):.2f} to {max(loads):.2f}" if loads else "",
        "float32 products": all_of("precision"), "torch": all_of("torch"), "Triton": all_of("triton"), "NumPy": all_of("numpy"),
        "Python": all_of("python"), "commit": ", ".join(commits),
        "measured": f"{' to '.join(dict.fromkeys([times[0], times[-1]]))} UTC" if times else "",
    }  # fmt: skip
    return [(name, value) for name, value in found.items() if value]


def draw(rows: Sequence[Row], folder: Path, prefix: str) -> list[Figure]:
    """Every figure of one machine's rows."""
    if figures.problem():
        return []
    rows = [row for row in rows if row.allocator != "default"] or list(rows)
    known = dict(facts(rows))
    where = ", ".join(
        filter(None, [known.get("GPU") or known.get("CPU"), f"threads {known.get('threads')}", known.get("commit")])
    )
    date = max((row.time_utc[:10] for row in rows), default="")
    wanted: list[tuple[str, str, Any]] = []
    for op in dict.fromkeys(row.op for row in rows):
        of_op = [row for row in rows if row.op == op]
        for dtype in sorted({row.dtype for row in of_op}, reverse=True):
            chosen = [row for row in of_op if row.dtype == dtype]
            wanted.append((f"speedup-{op}-{dtype}", f"{op}, {dtype}: against eager", figures.speedups(chosen, f"{op} {dtype}")))
        modes = [m for m in ("train", "fwd") if any(row.mode == m for row in of_op)][:1]
        for mode in modes:
            chosen = [row for row in of_op if row.mode == mode]
            title = f"{op}, {mode}: throughput against size"
            wanted.append((f"throughput-{op}-{mode}", title, figures.throughput(chosen, f"{op} {mode}")))
    for dtype in sorted({row.dtype for row in rows}, reverse=True):
        chosen = [row for row in rows if row.dtype == dtype]
        wanted.append((f"roofline-{dtype}", f"Roofline, {dtype}", figures.roofline(chosen, f"dlaccel, {dtype}")))
    return _saved(wanted, folder, prefix, f"{where}, {date}")


def _saved(wanted: Sequence[tuple[str, str, Any]], folder: Path, prefix: str, where: str) -> list[Figure]:
    """(name, title, figure) for the page, and as PNG files in `folder`. A picture on its own says where it comes from."""
    drawn = []
    for name, title, figure in wanted:
        if figure is None:
            continue
        svg = figures.svg(figure, prefix + name)
        figure.text(0.005, 0.003, where, fontsize=5)
        figures.png(figure, folder / f"{prefix}{name}.png")
        figures.close(figure)
        drawn.append(Figure(f"{title} ({where})", svg, f"figures/{prefix}{name}.png"))
    return drawn


def recorded(out: Path) -> dict[str, list[Row]]:
    """Rows that came with dlaccel, by folder of bench/results; not those of `out`."""
    found = {}
    for folder in sorted(p for p in RECORDED.glob("*") if p.is_dir() and p.resolve() != out.resolve()):
        rows, _ = results.read_all(sorted(folder.glob("bench*.jsonl")))
        if rows:
            found[folder.name] = rows
    return found


@dataclass
class Predicted:
    """Kernels of one GPU, measured beside predicted."""

    gpu: str
    where: str
    means: list[tuple[str, float, int]]
    table: list[tuple[str, ...]]
    figures: list[Figure]


def kernel_pairs(out: Path) -> tuple[list[kernel_times.Pair], list[str]]:
    """Kernels measured in `out` or in what came with dlaccel, beside their predictions, and what could not be read."""
    measured: dict[Any, kernel_times.KernelTime] = {}
    problems = []
    for path in dict.fromkeys(p.resolve() for p in (*sorted(RECORDED.glob(f"*/{kernel_times.FILE}")), out / kernel_times.FILE)):
        rows, bad = kernel_times.read(path)
        measured |= {(row.gpu, row.launch): row for row in rows}
        problems += bad
    return kernel_times.pairs(measured.values()), problems


def kernel_lines(out: Path) -> list[str]:
    """For the terminal."""
    return [
        f"{gpu}, {op}: measured {mean:.2f} x predicted, geometric mean of {n} kernels"
        for gpu, op, mean, n in kernel_times.means(kernel_pairs(out)[0])
    ]


def predicted(out: Path, folder: Path) -> tuple[list[Predicted], list[str]]:
    """Of each GPU with kernels measured beside predicted, and what could not be read."""
    pairs, problems = kernel_pairs(out)
    found = []
    for i, gpu in enumerate(dict.fromkeys(pair.measured.gpu for pair in pairs)):
        mine = [pair for pair in pairs if pair.measured.gpu == gpu]
        commits = {pair.measured.git_sha[:12] for pair in mine} - {""}
        dates = {pair.measured.time_utc[:10] for pair in mine}
        where = ", ".join(filter(None, [gpu, *sorted(commits), *sorted(dates)]))
        drawn: list[tuple[str, str, Any]] = []
        if figures.problem() is None:
            title = "Kernels, measured against predicted"
            drawn = [("kernels", title, figures.predicted(mine, f"{title}, {gpu}"))]
        found.append(
            Predicted(
                gpu, where, [(op, mean, n) for _, op, mean, n in kernel_times.means(mine)],
                [kernel_times.cells(pair) for pair in mine], _saved(drawn, folder, f"k{i}-", where),
            )
        )  # fmt: skip
    return found, problems


def claims(out: Path) -> tuple[str, list[str]]:
    """The claims' section of the page, and what could not be read of claims.jsonl."""
    from dlaccel.bench.claims import report
    from dlaccel.bench.claims.row import read

    path = out / "claims.jsonl"
    if not path.exists():
        return "", []
    try:
        return report.section(out), read(path)[1]
    except ValueError as error:
        return "", [str(error)]


def write(out: Path, rows: Sequence[Row], problems: Sequence[str]) -> Path:
    """Writes report.html and figures/ into `out`. Raises ImportError without jinja2."""
    from jinja2 import Environment, FileSystemLoader

    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.gpu or row.cpu, []).append(row)
    here = [machine(name, found, folder, f"m{i}-") for i, (name, found) in enumerate(sorted(groups.items()))]
    others = [machine(f"{name} (recorded)", kept, folder, f"{name}-") for name, kept in recorded(out).items()]
    kernels, unread = predicted(out, folder)
    claim_section, bad = claims(out)
    try:
        found, absent, made_on = verify.read(out / "verify.json")
    except ValueError as error:
        found, absent, made_on = [], {}, ""
        bad = [*bad, str(error)]
    providers, lines = verify.grid(found)
    wrong = [f for f in found if f.outcome == verify.WRONG]
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True)
    page = environment.get_template("report.html").render(
        machines=here, recorded=others, right=verify.counts(found), headers=summary.HEADERS,
        problems=[*problems, *unread, *bad],
        loss=summary.LOSS, kernels=kernels, kernel_headers=kernel_times.HEADERS,
        claims=claim_section, figure_problem=figures.problem(), providers=providers, lines=lines, wrong=wrong,
        absent=absent, made_on=made_on,
    )  # fmt: skip
    path = out / "report.html"
    results.write_whole(path, page)
    return path
