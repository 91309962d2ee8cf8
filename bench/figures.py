"""The figures of the report, by matplotlib: speed-up with spread, throughput against size, roofline.

Each function returns a figure or None where there is nothing to draw. The one ink colour, INK, becomes the page's text colour
in the report, so that figures read on a light and on a dark page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dlaccel.bench.kernel_times import Pair
from dlaccel.bench.results import Row
from dlaccel.bench.summary import eager_ms, losses, verdict

INK = "#1f2328"
COLOURS = {"dlaccel": "#0969da", "eager": "#8c959f"}
OTHERS = ("#bf8700", "#1a7f37", "#8250df", "#bc4c00", "#0e7490", "#a475f9", "#6f4e37", "#57606a")
LOSS_COLOUR = "#cf222e"
STYLE: dict[Any, Any] = {
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "axes.titleweight": "bold",
    "font.size": 9, "font.family": "sans-serif", "legend.frameon": False, "svg.fonttype": "none", "figure.dpi": 100,
}  # fmt: skip


def problem() -> str | None:
    """Why no figure can be drawn, or None."""
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed"
    matplotlib.use("Agg")
    return None


@contextmanager
def style() -> Iterator[Any]:
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        yield pyplot


def colour(provider: str, others: Sequence[str]) -> str:
    return COLOURS.get(provider) or OTHERS[sorted(others).index(provider) % len(OTHERS)]


def svg(figure: Any, name: str) -> str:
    """The figure as an element for an HTML page, in the page's text colour. `name` keeps its ids apart from other figures'."""
    from matplotlib import pyplot

    text = io.StringIO()
    with pyplot.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    source = text.getvalue()
    source = source[source.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", source)


def png(figure: Any, path: Any) -> None:
    figure.savefig(path, format="png", dpi=150, facecolor="white")


def close(figure: Any) -> None:
    from matplotlib import pyplot

    pyplot.close(figure)


def _plain_log_axis(axis: Any) -> None:
    """1, 2, 5, 10, 20, ... in plain numbers, or 1, 10, 100, ... over more than three decades. Set the limits before."""
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,), numticks=12))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _speaking(row: Row) -> str:
    return row.case if row.layout == "contiguous" or row.layout in row.case else f"{row.case} {row.layout}"


def speedups(rows: Sequence[Row], title: str) -> Any:
    """Ratio to eager of every provider, one panel a mode, with the spread of processes; below 1 it is slower than eager."""
    rows = [row for row in rows if row.status == "passed" and row.provider != "eager" and row.ratio]
    if not rows:
        return None
    modes = [m for m in ("fwd", "bwd", "train", "dgrad", "wgrad") if any(r.mode == m for r in rows)]
    cases = list(dict.fromkeys(_speaking(r) for r in rows))
    providers = sorted({r.provider for r in rows}, key=lambda p: (p != "dlaccel", p))
    others = [p for p in providers if p not in COLOURS]
    height = 0.8 / len(providers)
    with style() as plt:
        size = (2.2 + 2.6 * len(modes), 1.3 + len(cases) * max(0.28, 0.17 * len(providers)))
        figure, axes = plt.subplots(1, len(modes), figsize=size, sharey=True, squeeze=False, layout="constrained")
        for ax, mode in zip(axes[0], modes, strict=True):
            ax.axvline(1, color=INK, lw=1)
            for i, provider in enumerate(providers):
                for row in rows:
                    if row.mode != mode or row.provider != provider:
                        continue
                    assert row.ratio is not None
                    y = cases.index(_speaking(row)) + (i - (len(providers) - 1) / 2) * height
                    lost = provider == "dlaccel" and verdict(row) == "LOSS"
                    shade = LOSS_COLOUR if lost else colour(provider, others)
                    ax.barh(y, row.ratio, height=height * 0.92, color=shade, alpha=0.55 if eager_ms(row) < 0.02 else 1)
                    ax.plot(row.interval, [y, y], color=INK, lw=1, marker="|", ms=4)
            ax.set_title(mode)
            ax.set_xlabel("times as fast as eager")
            ax.set_xlim(left=0)
            ax.grid(axis="x", lw=0.4, alpha=0.4)
            ax.set_axisbelow(True)
        axes[0][0].set_yticks(range(len(cases)), cases)
        axes[0][0].set_ylim(len(cases) - 0.4, -0.6)
        handles = [plt.Rectangle((0, 0), 1, 1, color=colour(p, others)) for p in providers]
        names = [*providers]
        if losses(rows):
            handles.append(plt.Rectangle((0, 0), 1, 1, color=LOSS_COLOUR))
            names.append("dlaccel, a losing row")
        figure.legend(handles, names, loc="outside lower center", ncols=len(names))
        figure.suptitle(title, fontsize=11)
    return figure


def throughput(rows: Sequence[Row], title: str) -> Any:
    """Rate against the size of the work, one panel a dtype, with the measured ceiling."""
    rows = [row for row in rows if row.status == "passed" and row.bytes and row.median_ms]
    if not rows:
        return None
    # The rate that bounds most rows: arithmetic or memory.
    near = [(row.tflops or 0) / row.ceiling_tflops for row in rows if row.ceiling_tflops]
    far = [(row.gbps or 0) / row.ceiling_gbps for row in rows if row.ceiling_gbps]
    arithmetic = sum(near) > sum(far)
    unit = "GFLOP/s" if arithmetic else "GB/s"

    def point(row: Row) -> tuple[float, float, float | None]:
        if arithmetic:
            return (row.flops or 0) / 1e9, 1e3 * (row.tflops or 0), 1e3 * row.ceiling_tflops if row.ceiling_tflops else None
        return (row.bytes or 0) / 1e6, row.gbps or 0, row.ceiling_gbps

    dtypes = sorted({row.dtype for row in rows}, reverse=True)
    providers = sorted({r.provider for r in rows}, key=lambda p: (p != "dlaccel", p))
    others = [p for p in providers if p not in COLOURS]
    with style() as plt:
        size = (1.2 + 3.6 * len(dtypes), 3.4)
        figure, axes = plt.subplots(1, len(dtypes), figsize=size, squeeze=False, layout="constrained")
        for ax, dtype in zip(axes[0], dtypes, strict=True):
            for provider in providers:
                found = sorted((row for row in rows if row.dtype == dtype and row.provider == provider), key=point)
                if not found:
                    continue
                x, y, _ = zip(*map(point, found), strict=True)
                low, high = ([p * m / t for p, m, t in zip(y, (r.median_ms for r in found), spread, strict=True)]  # type: ignore[operator]
                             for spread in ((r.p80_ms for r in found), (r.p20_ms for r in found)))  # fmt: skip
                shade = colour(provider, others)
                ax.plot(x, y, color=shade, marker="o", ms=4, lw=1.4, label=provider)
                ax.fill_between(x, low, high, color=shade, alpha=0.18, lw=0)
            roofs = sorted({p[::2] for p in map(point, (r for r in rows if r.dtype == dtype)) if p[2]})
            if len({size for size, _ in roofs}) == 1:  # a line without ends
                ax.axhline(max(roof or 0 for _, roof in roofs), color=INK, ls="--", lw=1, label="measured ceiling")
            elif roofs:
                ax.plot(*zip(*roofs, strict=True), color=INK, ls="--", lw=1, label="measured ceiling")
            ax.set_xscale("log")
            _plain_log_axis(ax.xaxis)
            ax.set_ylim(bottom=0)
            ax.set_title(dtype)
            ax.set_xlabel("GFLOP of work" if arithmetic else "least traffic, MB")
            ax.grid(lw=0.4, alpha=0.4)
        axes[0][0].set_ylabel(unit)
        handles, names = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)))
        figure.suptitle(title, fontsize=11)
    return figure


def roofline(rows: Sequence[Row], title: str) -> Any:
    """Arithmetic rate against intensity, both logarithmic, under the least and the largest measured roof of these rows: the
    bandwidth of a working set falls with its size."""
    rows = [r for r in rows if r.status == "passed" and r.provider == "dlaccel" and r.bytes and r.flops and r.tflops]
    roofs = [(r.ceiling_gbps, r.ceiling_tflops, r.working_set) for r in rows if r.ceiling_gbps and r.ceiling_tflops]
    if not rows or not roofs:
        return None
    ops = sorted({r.op for r in rows})
    with style() as plt:
        figure, ax = plt.subplots(figsize=(7.2, 4), layout="constrained")
        for i, op in enumerate(ops):
            found = [r for r in rows if r.op == op]
            x = [(r.flops or 0) / (r.bytes or 1) for r in found]
            y = [1e3 * (r.tflops or 0) for r in found]
            ax.plot(x, y, ls="", marker="osD^vPX"[i % 7], ms=5, alpha=0.8, color=(COLOURS["dlaccel"], *OTHERS)[i % 9], label=op)
        low, high = min(roofs, key=lambda roof: roof[0]), max(roofs, key=lambda roof: roof[0])
        peak = 1e3 * max(r[1] for r in roofs)
        for (bandwidth, _, size), line in ((low, "--"), (high, ":")):
            if line == ":" and high[0] == low[0]:
                continue
            label = f"{bandwidth:.3g} GB/s" + (f" at {size / 1e6:.3g} MB" if size else "") + f", {peak:.4g} GFLOP/s"
            intensities = (2.0**-6, peak / bandwidth, 2.0**16)
            ax.plot(intensities, [min(peak, bandwidth * i) for i in intensities], color=INK, ls=line, lw=1, label=label)
        ax.set_xscale("log")
        ax.set_yscale("log")
        points = [(r.flops or 0) / (r.bytes or 1) for r in rows]
        ridge = peak / high[0]  # where the roofs meet; shown, so that the picture says which side a point is on
        ax.set_xlim(min(*points, ridge) / 2, max(*points, peak / low[0]) * 2)
        ax.set_ylim(bottom=0.5 * min(1e3 * (r.tflops or 0) for r in rows))
        _plain_log_axis(ax.xaxis)
        _plain_log_axis(ax.yaxis)
        ax.set_xlabel("FLOP per byte of least traffic")
        ax.set_ylabel("GFLOP/s")
        ax.grid(lw=0.4, alpha=0.4)
        ax.legend(loc="lower right", fontsize=8)
        figure.suptitle(title, fontsize=11)
    return figure


def predicted(pairs: Sequence[Pair], title: str) -> Any:
    """Measured against predicted times of kernels, both logarithmic, with the diagonal where the model is right."""
    if not pairs:
        return None
    ops = sorted({pair.measured.op for pair in pairs})
    with style() as plt:
        figure, ax = plt.subplots(figsize=(6, 5), layout="constrained")
        for i, op in enumerate(ops):
            found = [pair for pair in pairs if pair.measured.op == op]
            x, y = [1e3 * pair.predicted_ms for pair in found], [1e3 * pair.measured.median_ms for pair in found]
            ax.plot(x, y, ls="", marker="osD^vPX"[i % 7], ms=5, alpha=0.8, color=(COLOURS["dlaccel"], *OTHERS)[i % 9], label=op)
        times = [1e3 * t for pair in pairs for t in (pair.predicted_ms, pair.measured.median_ms)]
        ends = (min(times) / 1.5, max(times) * 1.5)
        ax.plot(ends, ends, color=INK, lw=1, label="measured = predicted")
        for axis, name in ((ax.xaxis, "predicted, us"), (ax.yaxis, "measured, us")):
            axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": ends, f"{axis.axis_name}label": name})
            _plain_log_axis(axis)
        ax.set_aspect("equal")
        ax.grid(lw=0.4, alpha=0.4)
        ax.legend(loc="upper left", fontsize=8)
        figure.suptitle(title, fontsize=11)
    return figure
