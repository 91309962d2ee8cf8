"""In a source checkout the kernels lie in ../../kernels; an installed copy holds them here."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "kernels")]
