"""New directories of Parquet files, local or on any storage that fsspec knows.

Tasks write one file each; ``_manifest.json`` comes last and says that all of them are there.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from dmixed.errors import DataError
from dmixed.sources.files import redact

MANIFEST = "_manifest.json"
SCHEMA = "dmixed-rows/1"
_OWN = re.compile(r"part-\d{5,}\.parquet|_manifest\.json")
_NO_FOLDERS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "r2"}


def _make_folder(fs: Any, path: str) -> None:
    """Make a folder where there are such things; an object store would make a bucket."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if not protocols & _NO_FOLDERS:
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
    """A directory to fill, by tasks on any machine.

    Attributes
    ----------
    location
        path or URI
    options
        of fsspec's filesystem; not shown
    """

    location: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def write(self, name: str, table: pa.Table) -> File:
        """Write one file.

        Raises
        ------
        DataError
            the storage refuses
        """
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        content = buffer.getvalue()
        with self._reached() as (fs, root):
            path = f"{root}/{name}"
            _make_folder(fs, path.rpartition("/")[0])
            fs.pipe_file(path, content)
        return File(name, len(table), len(content))

    def finish(self, files: Sequence[File], columns: Mapping[str, str], formula: str) -> None:
        """Write the manifest, when every file is where this process sees it.

        Parameters
        ----------
        columns
            name -> Arrow type
        formula
            of the model
        """
        with self._reached() as (fs, root):
            for written in files:
                path = f"{root}/{written.file}"
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
            fs.pipe_file(f"{root}/{MANIFEST}", text.encode("ascii"))

    def prepare(self) -> bool:
        """Check that nothing is there, and make a local directory; whether it was made.

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
            _make_folder(fs, root)
            return made

    def clear(self, made: bool) -> None:
        """Remove the files that tasks have written, as far as the storage lets."""
        with contextlib.suppress(Exception), self._reached() as (fs, root):
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
        location = self.location
        if "://" not in location:
            location = os.path.abspath(os.path.expanduser(location))
        try:
            fs, root = url_to_fs(location, **self.options)
            yield fs, root.rstrip("/")
        except DataError:
            raise
        except Exception as error:  # each storage has errors of its own
            reason = redact(f"{type(error).__name__}: {error}", self.options)
            raise DataError(f"cannot write to {redact(self.location)}: {reason}") from None


@contextmanager
def new_place(out: Any, storage_options: Mapping[str, Any] | None = None) -> Iterator[Place]:
    """A new or empty place; after an error nothing of it remains.

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
    location = os.fspath(out)
    place = Place(location, dict(storage_options or {}) if "://" in location else {})
    made = place.prepare()
    try:
        yield place
    except BaseException:
        place.clear(made)
        raise
