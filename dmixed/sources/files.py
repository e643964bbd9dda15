"""Which files a path, folder, pattern or URI names, on any storage that fsspec knows."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, TypeAlias
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from dmixed.errors import DataError
from dmixed.sources.storages import BUCKETS, reason, redact

THREADS = 16  # paths looked at at a time
NULL_FOLDER = "__HIVE_DEFAULT_PARTITION__"
_WILDCARD = re.compile(r"[*?[]")
_OTHER_FORMATS = {
    ".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".feather", ".arrow", ".ipc", ".orc",
    ".xlsx", ".sas7bdat", ".dta", ".rds",
}  # fmt: skip
# Folders of table formats hold files that are no longer part of the table.
DELTA_LOG = "_delta_log"
_TABLES = {DELTA_LOG: "a Delta", ".hoodie": "a Hudi"}
_STAMPS = ("ETag", "etag", "md5Hash", "content_md5", "generation", "mtime", "LastModified",
           "last_modified", "updated", "modified")  # fmt: skip


State: TypeAlias = tuple[int | None, str]


@dataclass(frozen=True, slots=True)
class FileSet:
    """Parquet files, those of each location in the order of their paths.

    Attributes
    ----------
    filesystem
        the Arrow filesystem that opens them
    paths
        as the filesystem wants them
    folders
        for each file, the values of its ``key=value`` folders, None for hive's null folder
    prefix
        what messages put before a path, "s3://" or nothing
    states
        for each file, its size in bytes and etag or time of modification, as it was listed
    location
        absolute path or URI, without credentials; "" for several
    """

    filesystem: pa.fs.FileSystem
    paths: tuple[str, ...]
    folders: tuple[dict[str, str | None], ...]
    prefix: str
    states: tuple[State, ...]
    location: str


@dataclass(frozen=True, slots=True)
class DeltaFolder:
    """Folder of a Delta table.

    Attributes
    ----------
    filesystem
        the Arrow filesystem that opens its files
    root
        the folder, as the filesystem wants it
    uri
        of the folder
    prefix
        what messages put before a path
    options
        storage options, fsspec's; not shown
    """

    filesystem: pa.fs.FileSystem
    root: str
    uri: str
    prefix: str
    options: Mapping[str, Any] = field(repr=False)


class _Ranges(pa.fs.FSSpecHandler):  # type: ignore[misc]
    """Hands Arrow's range reads to the storage as they are.

    Arrow knows which bytes it needs and joins near ranges itself; fsspec's default would read
    megabytes ahead of each, that is, columns nobody asked for.
    """

    def open_input_file(self, path: str) -> pa.PythonFile:
        return pa.PythonFile(self.fs.open(path, mode="rb", cache_type="none"), mode="r")


def find_files(
    location: str, storage_options: Mapping[str, Any] | None = None
) -> FileSet | DeltaFolder:
    """Parquet files under a path or URI: a file, a folder with its sub-folders, or a pattern.

    Files and folders whose name starts with ``_`` or ``.`` are passed over. Folders ``key=value``
    below the path given, or below a pattern's first wildcard, are columns. A folder of a Delta
    table is left to those who can read its log.

    Raises
    ------
    DataError
        nothing is there, it cannot be reached, or it is not a collection of Parquet files
    """
    options = dict(storage_options or {})
    return _listed(location, _storage(location, options), options)


def _storage(location: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """Filesystem of a path or URI, and the path on it.

    Some filesystems of fsspec are others in other threads.
    """
    shown = redact(location)
    _refuse_format(location, shown)
    try:
        fs, root = url_to_fs(_absolute(location), **options)
    except FileNotFoundError:  # an archive that holds the files
        raise DataError(f"no Parquet file found at {shown}; check the path") from None
    except Exception as error:  # each storage has errors of its own
        raise DataError(f"cannot reach {shown}: {reason(error, options)}") from None
    return fs, root


def _listed(
    location: str, storage: tuple[Any, str], options: Mapping[str, Any]
) -> FileSet | DeltaFolder:
    (fs, root), shown = storage, redact(location)
    try:
        fs.invalidate_cache()  # fsspec would answer with what it listed earlier in this process
        listed = _list(fs, root)
    except FileNotFoundError:
        listed = {}, ""
    except Exception as error:
        raise DataError(f"cannot reach {shown}: {reason(error, options)}") from None
    local = isinstance(fs, LocalFileSystem)
    filesystem = pa.fs.LocalFileSystem() if local else pa.fs.PyFileSystem(_Ranges(fs))
    scheme = "" if local else location.split("://")[0] + "://"
    if isinstance(listed, str):
        prefix = "" if "://" in listed else scheme
        if listed != root.rstrip("/"):
            raise DataError(
                f"{shown} is some files of the Delta table {redact(prefix + listed)}, which may be "
                "out of date; open the table itself, with filters="
            )
        return DeltaFolder(filesystem, listed, prefix + listed, prefix, options)
    entries, base = listed
    below = {path: PurePosixPath(path[len(base) :].lstrip("/")).parts for path in entries}
    _refuse_tables(below, shown)
    paths = sorted(p for p, parts in below.items() if not any(x[0] in "_." for x in parts))
    if not paths:
        raise DataError(f"no Parquet file found at {shown}; {_why_nothing(fs, root)}")
    return FileSet(
        filesystem,
        tuple(paths),
        tuple(_folder_values(below[p][:-1]) for p in paths),
        "" if "://" in paths[0] else scheme,
        tuple(_state(entries[p]) for p in paths),
        redact(_absolute(location)),
    )


def find_several(
    locations: Sequence[str], storage_options: Mapping[str, Any] | None = None
) -> FileSet:
    """Parquet files under several paths or URIs of one storage, in the order of the list.

    Raises
    ------
    DataError
        see `find_files`; they are not on one storage, or a file is there twice
    """
    options = dict(storage_options or {})
    storages = [_storage(location, options) for location in locations]
    for location, (fs, _) in zip(locations, storages, strict=True):
        if fs != storages[0][0]:
            raise DataError(
                f"{redact(locations[0])} and {redact(location)} are on different storages: "
                "the paths of a list must be on one"
            )
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(_listed, locations, storages, [options] * len(locations))
        sets: list[FileSet] = []
        for location, files in zip(locations, found, strict=True):
            if isinstance(files, DeltaFolder):
                raise DataError(f"{redact(location)} is a Delta table: it cannot be one of a list")
            sets.append(files)
    paths = [path for files in sets for path in files.paths]
    _refuse_twice(paths, sets[0].prefix, isinstance(storages[0][0], LocalFileSystem))
    return FileSet(
        sets[0].filesystem,
        tuple(paths),
        tuple(folder for files in sets for folder in files.folders),
        sets[0].prefix,
        tuple(state for files in sets for state in files.states),
        "",
    )


def _refuse_twice(paths: Sequence[str], prefix: str, local: bool) -> None:
    """Refuse a file that is there under two names, as links are, or under one."""
    real = [os.path.realpath(path) for path in paths] if local else paths
    first: dict[str, str] = {}
    for path, file in zip(paths, real, strict=True):
        other = first.setdefault(file, path)
        if other is not path:
            what = "twice in the list" if other == path else f"the same file as {other}"
            raise DataError(f"{redact(prefix + path)} is {what}: its rows would count twice")


def _refuse_format(location: str, shown: str) -> None:
    """Refuse a path whose extension is that of another format."""
    name = location.rstrip("/").lower().removesuffix(".gz").removesuffix(".zip")
    extension = os.path.splitext(name)[1]
    if extension in _OTHER_FORMATS:
        raise DataError(
            f"{shown}: paths are read as Parquet, not {extension}; read it into a DataFrame first"
        )


def _why_nothing(fs: Any, root: str) -> str:
    """What to look at where there is no file."""
    bucket = root.partition("/")[0]
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if bucket and protocols & BUCKETS:
        with suppress(Exception):
            if not fs.exists(bucket):
                return f"these credentials see no bucket {bucket!r}: check its name and whose it is"
    return "check the path"


def _absolute(location: str) -> str:
    """Return a URI as it is, a path from the root."""
    return location if "://" in location else os.path.abspath(os.path.expanduser(location))


def _list(fs: Any, root: str) -> tuple[dict[str, Mapping[str, Any]], str] | str:
    """Files at a path or pattern, and the part of their paths in which names do not matter.

    Returns the folder of the Delta table instead if they are of one.
    """
    try:
        entry = fs.info(root)  # unlike `exists`, this lets a refusal through
    except FileNotFoundError:
        wildcard = _WILDCARD.search(root)
        if wildcard is None:
            raise
        base = root[: wildcard.start()].rpartition("/")[0]
        table = _delta_table(fs, base)
        if table is not None:
            return table
        matched = fs.glob(root, detail=True).values()
        return {k: v for entry in matched for k, v in _files(fs, entry).items()}, base
    if entry["type"] == "file":
        return {entry["name"]: entry}, entry["name"]
    table = _delta_table(fs, root)
    if table is not None:
        return table
    return _files(fs, entry), entry["name"]


def _delta_table(fs: Any, folder: str) -> str | None:
    """The folder if it is one of a Delta table, or what its ``key=value`` folders lie in."""
    folder = folder.rstrip("/")
    while True:
        try:
            fs.info(f"{folder}/{DELTA_LOG}")
        except (FileNotFoundError, NotADirectoryError):
            above, _, name = folder.rpartition("/")
            if "=" not in name or not above:
                return None
            folder = above
        else:
            return folder


def _files(fs: Any, entry: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the file itself, or all files below a folder, each with what the storage tells."""
    if entry["type"] == "file":
        return {entry["name"]: entry}
    found = fs.find(entry["name"], detail=True)
    return {p: file for p, file in found.items() if not p.endswith("/")}


def _state(entry: Mapping[str, Any]) -> State:
    """Size, and what changes when the file does."""
    stamp = next((entry[key] for key in _STAMPS if entry.get(key) is not None), "")
    return entry.get("size"), str(stamp).strip('"')


def _refuse_tables(below: Mapping[str, tuple[str, ...]], shown: str) -> None:
    """Refuse folders of a table format, whose files must not all be read."""
    for parts in below.values():
        kinds = [_TABLES[x] for x in parts if x in _TABLES]
        if parts and parts[-1].endswith(".metadata.json"):
            kinds.append("an Iceberg")
        if kinds:
            raise DataError(
                f"{shown} is {kinds[0]} table, some of whose files may be out of date; "
                "open it with its own library and pass a pyarrow Dataset or a DataFrame"
            )


def _folder_values(folders: tuple[str, ...]) -> dict[str, str | None]:
    """Values of the ``key=value`` folders of a path."""
    pairs = [folder.split("=", 1) for folder in folders if "=" in folder]
    return {unquote(k): None if v == NULL_FOLDER else unquote(v) for k, v in pairs}
