"""What the verbs of the command line share: lists of names, the names of dtypes, and errors that say what is valid."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable, Sequence

from dlaccel.bench.case import Case

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
DTYPES |= {name: name for name in DTYPES.values()}
MANY = 30  # names, more than which an error does not list


class UsageError(ValueError):
    """The command line asks for something that is not there."""


def choose(what: str, asked: Sequence[str], known: Iterable[str]) -> list[str]:
    """`asked`, if all of them are known."""
    known = list(known)
    for name in asked:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            shown = known if len(known) <= MANY else [*known[:3], f"and {len(known) - 3} more (`list {what}s`)"]
            raise UsageError(f"unknown {what} {name!r}{hint}; known: {', '.join(shown) or 'none'}")
    return list(asked)


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]  # names of cases contain spaces


def some_words(text: str) -> list[str]:
    if not words(text):
        raise argparse.ArgumentTypeError(f"expected a name, got {text!r}")
    return words(text)


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def between(low: int, high: float) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high}, got {text}" if high < float("inf") else
                                             f"expected at least {low}, got {text}")  # fmt: skip
        return value

    return integer


def add_lists(parser: argparse.ArgumentParser, **options: str | None) -> None:
    """Options that take names, separated by commas or by repeating the option; options: name=help."""
    for name, help in options.items():
        parser.add_argument(
            f"--{name}", f"--{name}s", type=some_words, action="extend", default=[], metavar=f"{name.upper()}[,...]", dest=name,
            help=help,
        )  # fmt: skip


def named(asked: Sequence[str], known: Sequence[Case]) -> list[Case]:
    """The cases that `asked` names: each a name, or several parts of names, separated by commas. Raises UsageError."""
    by_name = {str(case): case for case in known}
    found: dict[str, Case] = {}
    for text in asked:
        for word in [text] if any(text in (case.name, name) for name, case in by_name.items()) else words(text):
            exact = {name: case for name, case in by_name.items() if word in (case.name, name)}
            matching = exact or {name: case for name, case in by_name.items() if word in name}
            if not matching:
                choose("case", [word], by_name)
            found |= matching
    return list(found.values())
