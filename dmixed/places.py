"""New directories of Parquet files, local or on any storage that fsspec knows.

Tasks write one file each; ``_manifest.json`` comes last and says that all of them are there.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from dmixed.errors import DataError
from dmixed.sources.storages import BUCKETS, reason, redact

MANIFEST = "_manifest.json"
SCHEMA = "dmixed-rows/1"
TRIES, WAIT = 50, 0.02
"""How often, and after how many seconds, a folder is removed that tasks still write to."""

_OWN = re.compile(r"part-\d{5,}\.parquet|_manifest\.json")


def _make_folder(fs: Any, path: str) -> None:
    """Make a folder where there are such things; an object store would make a bucket."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if not protocols & BUCKETS:
        fs.makedirs(path, exist_ok=True)


def part_name(number: int) -> str:
    """Name of a file."""
    return f"part-{number:05d}.parquet"


@dataclass(frozen=True, slots=True)
class File:
    """A file that was written: its name below the place, its rows, and its bytes."""

    file: str
    rows: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Place:
    """A directory to fill, by tasks on any machine; see `new_place`.

    Attributes
    ----------
    location
        absolute path, or URI
    options
        of fsspec's filesystem; not shown
    staging
        folder below it where a local directory's files wait until all are there, or nothing
    """

    location: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    staging: str = ""

    def write(self, name: str, table: pa.Table) -> File:
        """Write one file; a local one only while its folder is there.

        Raises
        ------
        DataError
            the storage refuses
        """
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        content = buffer.getvalue()
        with self._reached() as (fs, root):
            fs.pipe_file(f"{root}{self.staging}/{name}", content)
        return File(name, len(table), len(content))

    def make_folder(self, name: str) -> None:
        """Make a folder for files ``name/...``."""
        with self._reached() as (fs, root):
            _make_folder(fs, f"{root}{self.staging}/{name}")

    def finish(self, files: Sequence[File], columns: Mapping[str, str], formula: str) -> None:
        """Put the files in their places, and the manifest when all are there.

        Parameters
        ----------
        columns
            name -> Arrow type
        formula
            of the model

        Raises
        ------
        DataError
            a file is not where this process sees it
        """
        with self._reached() as (fs, root):
            for written in files:
                path = f"{root}{self.staging}/{written.file}"
                if not fs.exists(path) or fs.size(path) != written.bytes:
                    raise DataError(
                        f"{redact(self.location)}: {written.file}, which a worker wrote, is not "
                        "there: give a place that all machines share, as s3://bucket/path"
                    )
            manifest = {
                "schema": SCHEMA,
                "version": version("dmixed"),
                "formula": formula,
                "rows": sum(written.rows for written in files),
                "columns": dict(columns),
                "files": [asdict(written) for written in files],
            }
            text = json.dumps(manifest, indent=1, allow_nan=False) + "\n"
            if self.staging:
                for entry in os.listdir(root + self.staging):
                    os.replace(f"{root}{self.staging}/{entry}", f"{root}/{entry}")
                os.rmdir(root + self.staging)
            fs.pipe_file(f"{root}/{MANIFEST}", text.encode("ascii"))

    def prepare(self) -> bool:
        """Check that nothing is there, and make the folders; whether the place was made.

        Raises
        ------
        DataError
            there is something
        """
        with self._reached() as (fs, root):
            fs.invalidate_cache()
            made = not fs.exists(root)
            if not made and not fs.isdir(root):
                raise DataError(f"{redact(self.location)}: exists and is not a directory")
            if not made and fs.ls(root, detail=False):
                raise DataError(
                    f"{redact(self.location)}: the directory is not empty; results are never "
                    "overwritten, give a new directory"
                )
            _make_folder(fs, root + self.staging)
            return made

    def clear(self, made: bool) -> None:
        """Remove what was written, as far as the storage lets.

        Tasks may still be writing: once their local folder is gone, they cannot.
        """
        with contextlib.suppress(Exception), self._reached() as (fs, root):
            for _ in range(TRIES if self.staging else 0):
                shutil.rmtree(root + self.staging, ignore_errors=True)
                if not os.path.exists(root + self.staging):
                    break
                time.sleep(WAIT)
            fs.invalidate_cache()
            found = [path for path in fs.find(root) if _OWN.fullmatch(path.rpartition("/")[2])]
            for path in found:
                fs.rm_file(path)
            folders = {path.rpartition("/")[0] for path in found} - {root}
            for folder in [*folders, *([root] if made else [])]:
                with contextlib.suppress(Exception):  # not empty, or no such thing as a folder
                    fs.rmdir(folder)

    @contextmanager
    def _reached(self) -> Iterator[tuple[Any, str]]:
        """Filesystem and path; its errors, without credentials."""
        try:
            fs, root = url_to_fs(self.location, **self.options)
            yield fs, root.rstrip("/")
        except DataError:
            raise
        except Exception as error:  # each storage has errors of its own
            why = reason(error, self.options)
            raise DataError(f"cannot write to {redact(self.location)}: {why}") from None


@contextmanager
def new_place(out: Any, storage_options: Mapping[str, Any] | None = None) -> Iterator[Place]:
    """A new or empty place; after an error nothing of it remains.

    In a local directory the files appear when all of them are written; elsewhere they appear
    one by one, and those of a task that was running may outlast an error. Without a manifest
    they are not a result.

    Parameters
    ----------
    storage_options
        for a URI

    Raises
    ------
    DataError
        there is something already, or it cannot be written
    """
    if not isinstance(out, str | os.PathLike) or not os.fspath(out):
        raise DataError(f"out={out!r}: must be the path or URI of a new or empty directory")
    location, staging = os.fspath(out), ""
    if "://" in location:
        place = Place(location, dict(storage_options or {}))
    else:  # workers have working directories of their own
        staging = f"/.{uuid4().hex}.dmixed"
        place = Place(os.path.abspath(os.path.expanduser(location)), {}, staging)
    made = place.prepare()
    try:
        yield place
    except BaseException:
        place.clear(made)
        raise


def written(location: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a place that is complete: rows, columns, files."""
    import fsspec

    with fsspec.open(f"{os.fspath(location)}/{MANIFEST}", "rb") as file:
        found: dict[str, Any] = json.load(file)
    return found
