"""The top-level folders kernels/ and bench/ ship as dlaccel.kernels and dlaccel.bench (docs/architecture.md)."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent
version: dict[str, str] = {}
exec((ROOT / "dlaccel" / "_version.py").read_text(), version)


def tree(package: str, folder: str) -> list[str]:
    return [
        package,
        *(f"{package}.{name}" for name in find_namespace_packages(folder, exclude=["*__pycache__*", "results*"])),
    ]


setup(
    name="dlaccel",
    version=version["__version__"],
    description="Triton kernels for deep-learning layers as PyTorch operators, with fast CPU fallbacks and an honest benchmark",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    install_requires=["torch>=2.11", "numpy", 'triton>=3.6; platform_system == "Linux"'],
    extras_require={
        "bench": ["matplotlib", "tabulate", "tqdm", "jinja2"],
        "demo": ["mlxtend", "scikit-learn"],
        "dev": [
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "hypothesis",
            "expecttest",
            "ruff",
            "mypy",
            "setuptools",
            "wheel",
        ],
    },
    package_dir={"dlaccel": "dlaccel", "dlaccel.kernels": "kernels", "dlaccel.bench": "bench"},
    packages=[
        "dlaccel",
        "dlaccel.ops",
        "dlaccel.fallback",
        *tree("dlaccel.kernels", "kernels"),
        *tree("dlaccel.bench", "bench"),
    ],
    package_data={
        "dlaccel": ["py.typed"],
        "dlaccel.kernels": ["tuned/*.json"],
        "dlaccel.bench": ["claims/*.json", "templates/*", "results/**/*.json", "results/**/*.jsonl"],
    },
    entry_points={"console_scripts": ["dlaccel-bench=dlaccel.bench.__main__:main"]},
)
