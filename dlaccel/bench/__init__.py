"""In a source checkout the benchmarks lie in ../../bench; an installed copy holds them here."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "bench")]
