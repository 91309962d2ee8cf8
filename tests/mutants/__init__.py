"""Seeded bugs: a test suite that they survive is not worth its green.

    python -m tests.mutants                     every op (make mutants)
    python -m tests.mutants linear_relu --jobs 2 --docs     one, two processes; renews its table in docs/testing.md

A file of this folder lists the mutants of one op: one changed line each, applied to a copy of the tree, where the op's tests
then run until the first fails. About 10 an op: a mask, a stride, the accumulator's dtype, a tail, NaN, a lost gradient, an
overwritten input.

    TESTS = ("tests/test_linear_relu.py", "tests/test_contract.py -k linear_relu")    # in the order that kills soonest
    MUTANTS = [Mutant("row mask one too wide", "kernels/linear_relu.py", "(rows < M)", "(rows <= M)"), ...]

Verdicts: killed (by which test); survived; stale (`old` is no longer there exactly once: a mutant must follow the code); broken
(the mutant cannot even be imported, or its tests cannot be collected: it proves nothing). Unless all are killed, the exit
status is 1. The unchanged tree runs first and must pass. Results are kept in build/mutants.jsonl and used again as long as no
Python file has changed, so an interrupted run goes on where it was.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    name: str  # what is wrong with it: unique within the op
    file: str  # from the root
    old: str  # text that stands in the file exactly once; whole lines with their neighbours where one is not enough
    new: str
    tests: tuple[str, ...] = ()  # arguments of pytest, as in TESTS; default: TESTS of the op
