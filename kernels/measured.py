"""Measured configurations: tables that `dlaccel.tune` writes and `config.Choice` prefers to its static choice.

One JSON file a device: those that ship lie in kernels/tuned/, a user's own in cache_directory()/tuned and come first. An entry
holds for one kernel, dtype, bucket of sizes, torch and Triton version. A file that cannot be used is ignored, with a warning.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

SCHEMA = 1
SHIPPED = Path(__file__).parent / "tuned"

Table = dict[str, dict[str, Any]]  # key -> {"config": ..., "us": ..., "static_us": ..., "time_utc": ...}


def cache_directory() -> Path:
    """Of this user's tuned configurations and inspection reports: $DLACCEL_CACHE_DIR, else $XDG_CACHE_HOME/dlaccel."""
    chosen = os.environ.get("DLACCEL_CACHE_DIR")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dlaccel"


def file_name(device: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", device).strip("_") + ".json"


def user_file(device: str) -> Path:
    return cache_directory() / "tuned" / file_name(device)


def key(choice: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> str:
    versions = torch.__version__.partition("+")[0], triton.__version__
    return " ".join((choice, str(dtype).removeprefix("torch."), ",".join(map(bucket, sizes)), *versions))


def bucket(size: int) -> str:
    """Sizes up to 16 and flags by themselves (kernel sizes, strides), larger ones by the next power of two."""
    return str(size) if size <= 16 else f"<=2^{(size - 1).bit_length()}"


def lookup(choice: str, device: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[dict[str, Any], str] | None:
    """(configuration, the file it is from), or None."""
    wanted = key(choice, dtype, sizes)
    for path in (user_file(device), SHIPPED / file_name(device)):
        entry = _table(path, device).get(wanted)
        if entry is not None:
            return entry["config"], str(path)
    return None


def holds(path: Path, device: str, wanted: str) -> bool:
    """Whether the table has an entry of that key now."""
    return wanted in _read(path, device)[0]


@functools.cache
def _table(path: Path, device: str) -> Table:
    table, problem = _read(path, device)
    if problem:
        warnings.warn(f"{path}: {problem}; ignored", stacklevel=2)
    return table


def forget() -> None:
    """Read the tables again when next asked."""
    _table.cache_clear()


def _read(path: Path, device: str) -> tuple[Table, str]:
    """(the table, why it cannot be used or ""). A file that is not there is an empty table."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError) as error:
        return {}, f"not readable as JSON ({error})"
    if not isinstance(content, dict) or not isinstance(content.get("schema"), int):
        return {}, "not a table of configurations"
    if content["schema"] != SCHEMA:
        return {}, f"written by another version (schema {content['schema']}, this one reads {SCHEMA})"
    if content.get("device") != device:
        return {}, f"measured on {content.get('device')!r}, this is {device!r}"
    entries = content.get("entries")
    if not isinstance(entries, dict) or not all(_is_entry(entry) for entry in entries.values()):
        return {}, "entries are not configurations"
    return entries, ""


def _is_entry(entry: Any) -> bool:
    config = entry.get("config") if isinstance(entry, dict) else None
    return isinstance(config, dict) and all(isinstance(value, (int, str)) for value in config.values())


def save(path: Path, device: str, entries: Table) -> None:
    """Add entries to a table. Writers take turns; a reader sees the old file or the new one, whenever a writer is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _turn(path):
        for abandoned in path.parent.glob(f"{path.name}.*.tmp"):  # of writers that were killed: nobody else is writing now
            abandoned.unlink(missing_ok=True)
        before, problem = _read(path, device)
        if problem:
            aside = path.with_name(path.name + ".ignored")
            path.replace(aside)
            warnings.warn(f"{path}: {problem}; moved to {aside.name}", stacklevel=2)
        content = {"schema": SCHEMA, "device": device, "entries": dict(sorted((before | entries).items()))}
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".", suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    forget()


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Exclusive among processes; the system ends it with its holder."""
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
