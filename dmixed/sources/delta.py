"""Delta tables: the log says which files a version consists of, no other file is ever read.

Statistics in the log are not used to skip files: writers cut them (timestamps to milliseconds),
while footers are read anyway for the numbers of rows. Values of partitions are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs

from dmixed.errors import DataError
from dmixed.sources.files import DeltaFolder, State
from dmixed.sources.filters import Filter
from dmixed.sources.parquet import FileSource, equations
from dmixed.sources.storages import reason, redact

# Features of a table that change nothing for those who read its Parquet files as they are.
_HARMLESS = {"timestampNtz", "v2Checkpoint", "vacuumProtocolCheck"}
_S3 = {
    "key": "AWS_ACCESS_KEY_ID",
    "secret": "AWS_SECRET_ACCESS_KEY",
    "token": "AWS_SESSION_TOKEN",
    "endpoint_url": "AWS_ENDPOINT_URL",
    "region_name": "AWS_REGION",
    "anon": "AWS_SKIP_SIGNATURE",
}


def folder_source(
    folder: DeltaFolder, wanted: Filter | None = None, version: int | None = None
) -> FileSource:
    """Source from the folder of a Delta table.

    Its log is read by deltalake, its files through the filesystem that found it.
    """
    shown = redact(folder.uri)
    try:
        from deltalake import DeltaTable
    except ImportError:
        raise DataError(
            f'{shown} is a Delta table: reading it needs deltalake, pip install "dmixed[delta]"'
        ) from None
    options = _log_options(folder, shown)
    table = _opened(DeltaTable, folder.uri, version, options, shown, folder.options)
    filesystem = pa.fs.SubTreeFileSystem(folder.root, folder.filesystem)
    return _source(table, filesystem, shown, wanted, folder.options)


def table_source(
    table: Any, wanted: Filter | None = None, version: int | None = None
) -> FileSource:
    """Source from a ``deltalake.DeltaTable``, which stays as it is; its files are read by Arrow.

    Local files are opened directly, others with the table's own storage options.
    """
    uri, options = table.table_uri, getattr(table, "_storage_options", None)
    shown = redact(uri)
    if version is not None:
        table = _opened(type(table), uri, version, options, shown, options)
    scheme = urlparse(uri).scheme
    if scheme in ("", "file"):
        root = str(Path(unquote(urlparse(uri).path) if scheme else uri))
        filesystem = pa.fs.SubTreeFileSystem(root, pa.fs.LocalFileSystem())
        return _source(table, filesystem, shown, wanted, options)
    from deltalake.fs import DeltaStorageHandler

    handler = DeltaStorageHandler(uri, options)
    return _source(table, pa.fs.PyFileSystem(handler), shown, wanted, options)


def _opened(
    kind: Any,
    uri: str,
    version: int | None,
    options: Mapping[str, str] | None,
    shown: str,
    secret: Mapping[str, Any] | None,
) -> Any:
    """A version of a table."""
    try:
        return kind(uri, version=version, storage_options=dict(options) if options else None)
    except Exception as error:  # deltalake's own errors, and those of storages
        why = reason(error, secret, kind=False)
        what = shown if version is None else f"version {version} of {shown}"
        raise DataError(f"{what} cannot be opened as a Delta table: {why}") from None


def _source(
    table: Any,
    filesystem: pa.fs.FileSystem,
    shown: str,
    wanted: Filter | None,
    secret: Mapping[str, Any] | None,
) -> FileSource:
    """Source of the files of a table's version, as its log tells them."""
    _refuse_features(table, shown)
    name = shown.removeprefix("file://").rstrip("/")
    try:
        dataset = table.to_pyarrow_dataset(filesystem=filesystem)
        actions = pa.table(table.get_add_actions(flatten=True))
    except Exception as error:
        why = reason(error, secret, kind=False)
        raise DataError(f"{shown} cannot be read as a Delta table: {why}") from None
    # ":" and "//" are how a path tells that it is not below the table
    outside = [f.path for f in dataset.get_fragments() if "://" in f.path or f.path[:1] == "/"]
    if outside:
        raise DataError(
            f"{shown} has files that are not in its folder, as {redact(outside[0])}: "
            "copy the table, or pass its DataFrame"
        )
    states = _states(actions)
    partitions = table.metadata().partition_columns
    parquet = ds.ParquetFileFormat()
    fragments = []
    for fragment in sorted(dataset.get_fragments(), key=lambda f: f.path):
        known = ds.get_partition_keys(fragment.partition_expression)
        values = {key: known[key] for key in partitions}
        expression = equations(values, dataset.schema)
        file = parquet.make_fragment(fragment.path, filesystem, expression)
        fragments.append((f"{name}/{fragment.path}", file))
    source = FileSource(
        "delta",
        name,
        tuple(fragments),
        dataset.schema,
        wanted,
        tuple(states.get(file.path, (None, "")) for _, file in fragments),
        f"delta version {table.version()}",
        nullable=True,
        location=name,
    )
    _ = source.filter_columns
    return source


def _states(actions: pa.Table) -> dict[str, State]:
    """Size and time of each file, by its path as it is and as it was encoded in the log."""
    found: dict[str, State] = {}
    moments = actions["modification_time"].cast(pa.int64())
    columns = (actions["path"], actions["size_bytes"], moments)
    for path, size, moment in zip(*(column.to_pylist() for column in columns), strict=True):
        found[path] = size, str(moment)
        found.setdefault(unquote(path), found[path])
    return found


def _refuse_features(table: Any, shown: str) -> None:
    """Refuse tables whose files do not hold the rows as they are.

    deltalake refuses most of them itself, but not columns under other names in tables that
    declare them by a property alone.
    """
    protocol = table.protocol()
    features = set(protocol.reader_features or ())
    mapping = (table.metadata().configuration or {}).get("delta.columnMapping.mode", "none")
    if mapping != "none":
        features.add("columnMapping")
    refused = sorted(features - _HARMLESS)
    if refused or protocol.min_reader_version > 3:
        what = ", ".join(refused) or f"reader version {protocol.min_reader_version}"
        raise DataError(
            f"{shown} is a Delta table with {what}, whose files cannot be read as they are: "
            "rewrite it without (deletion vectors go with REORG TABLE ... APPLY (PURGE)), or read "
            "it with another engine and pass a DataFrame"
        )


def _log_options(folder: DeltaFolder, shown: str) -> dict[str, str] | None:
    """What deltalake calls fsspec's storage options."""
    if not folder.options:
        return None
    if not folder.uri.startswith(("s3://", "s3a://")):
        if folder.prefix == "":
            return None
        raise DataError(
            f"{shown} is a Delta table: on this storage, open it as "
            "deltalake.DeltaTable(uri, storage_options=...) and pass that"
        )
    client = folder.options.get("client_kwargs") or {}
    given = {**client, **{k: v for k, v in folder.options.items() if k != "client_kwargs"}}
    options = {
        _S3[key]: str(value).lower() if isinstance(value, bool) else str(value)
        for key, value in given.items()
        if key in _S3 and value is not None
    }
    if options.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        options["AWS_ALLOW_HTTP"] = "true"
    return options
