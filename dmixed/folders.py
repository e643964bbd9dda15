"""A directory on any storage that fsspec knows, whose files appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any
from uuid import uuid4

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from dmixed.errors import DataError
from dmixed.sources.storages import BUCKETS, reason, redact

UNNAMED = re.compile(r"\.[0-9a-f]{32}\.dmixed")
"""Names of files that are being written, and of those that a killed process was writing."""

REFUSED = {"PreconditionFailed", "ConditionalRequestConflict"}
"""Answers to a put that was to make a new object, where there is one or another is on its way."""


@dataclass(frozen=True)
class Folder:
    """A directory; small when pickled.

    Attributes
    ----------
    name
        as messages show it, without credentials
    location
        absolute path or URI
    options
        fsspec's storage options, for a URI
    """

    name: str
    location: str = field(repr=False)
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def at(cls, place: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Folder:
        """The directory at a path or URI, which need not be there yet."""
        text = os.fspath(place)
        if "://" in text:
            return cls(redact(text).rstrip("/"), text, dict(options or {}))
        return cls(text, os.path.abspath(os.path.expanduser(text)))

    def __reduce__(self) -> tuple[Any, ...]:
        return Folder, (self.name, self.location, dict(self.options))

    def file(self, name: str) -> str:
        """A file in it, as messages show it."""
        return os.path.join(self.name, name)

    def read(self, name: str, limit: int | None = None) -> bytes:
        """Contents of a file.

        Raises
        ------
        DataError
            naming the file, which cannot be read, or has more than ``limit`` bytes
        """
        try:
            with _plain_errors(self.options):
                found = self._content(name, limit)
        except OSError as error:
            why = error.strerror or error
            raise DataError(f"{self.file(name)}: cannot be read: {why}") from None
        if found is None:
            raise DataError(f"{self.file(name)}: has more than {limit:,} bytes")
        return found

    def size(self, name: str) -> int | None:
        """Bytes of a file, None if it is not there.

        Raises
        ------
        OSError
            the storage does not say
        """
        with _plain_errors(self.options):
            fs, path = self._fs, self._path(name)
            fs.invalidate_cache()  # fsspec would answer with what it listed earlier
            try:
                return int(fs.info(path)["size"])
            except (FileNotFoundError, NotADirectoryError):
                return None

    def put(self, name: str, content: Any, durable: bool = True) -> None:
        """Write a file, in place of one that is there.

        On a local disk it is written beside and renamed, elsewhere it is one put; readers see the
        old file or the new one.

        Parameters
        ----------
        content
            bytes, or a buffer of them
        durable
            return when a local disk has it, so that it outlives a loss of power

        Raises
        ------
        OSError
            it cannot be written; nothing is left behind
        """
        if self.local:
            with self._beside(content, durable) as beside:
                os.replace(beside, self._path(name))
            return
        with _plain_errors(self.options):
            self._make_root()
            self._fs.pipe_file(self._path(name), bytes(content))

    def create(self, name: str, content: Any) -> bool:
        """Write a file where there is none of its name; whether that was so.

        Of several processes that do so at the same time, on whatever machines, one does. As an
        answer may get lost, and some object stores look before they write but not while they do,
        what is there counts: contents must differ.

        Raises
        ------
        OSError
            it cannot be written; nothing is left behind
        """
        if self.local:
            with self._beside(content, True) as beside:
                try:
                    os.link(beside, self._path(name))
                except FileExistsError:
                    return False
                return True
        with _plain_errors(self.options):
            self._make_root()
            try:
                self._fs.pipe_file(self._path(name), bytes(content), mode="create")
            except FileExistsError:
                pass
            except OSError as error:
                if _answer(error) not in REFUSED:
                    raise
            self._fs.invalidate_cache()
            return bytes(self._fs.cat_file(self._path(name))) == bytes(content)

    def names(self) -> list[str]:
        """Names of the files and folders in it, none if it is not there.

        Raises
        ------
        OSError
            the storage does not say
        """
        with _plain_errors(self.options):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._root, detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        return [path.rstrip("/").rpartition("/")[2] for path in found]

    def age(self, name: str) -> float | None:
        """Seconds since a file was written, None where the storage does not say."""
        try:
            with _plain_errors(self.options):
                written = self._fs.modified(self._path(name))
        except (OSError, NotImplementedError):
            return None
        return (datetime.now(UTC) - written.astimezone(UTC)).total_seconds()

    def remove(self, name: str) -> None:
        """Remove a file, if it is there.

        Raises
        ------
        OSError
            it cannot be removed
        """
        with _plain_errors(self.options), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def below(self, name: str) -> Folder:
        """A directory in it."""
        return Folder(self.file(name), f"{self.location.rstrip('/')}/{name}", self.options)

    def remove_folder(self, name: str) -> None:
        """Remove a directory in it with all that is there, if it is there.

        Raises
        ------
        OSError
            it cannot be removed
        """
        with _plain_errors(self.options), contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._path(name), recursive=True)

    def youngest(self, name: str) -> float | None:
        """Seconds since a file below a directory in it was written, None where nothing says so."""
        below = self.below(name)
        with _plain_errors(self.options):
            self._fs.invalidate_cache()
            files = [path[len(below._root) + 1 :] for path in self._fs.find(below._root)]
        ages = [below.age(file) for file in files] or [self.age(name)]
        known = [age for age in ages if age is not None]
        return min(known) if len(known) == len(ages) else None

    @cached_property
    def _place(self) -> tuple[Any, str]:
        with _plain_errors(self.options):
            fs, root = url_to_fs(self.location, **self.options)
        return fs, str(root).rstrip("/") or "/"

    @property
    def _fs(self) -> Any:
        return self._place[0]

    @property
    def _root(self) -> str:
        return self._place[1]

    @property
    def local(self) -> bool:
        """Whether it is on a disk of this machine, or looks like one."""
        return isinstance(self._fs, LocalFileSystem)

    def _make_root(self) -> None:
        if not BUCKETS & set(_protocols(self._fs)):
            self._fs.makedirs(self._root, exist_ok=True)

    @contextlib.contextmanager
    def _beside(self, content: Any, durable: bool) -> Iterator[str]:
        """A file on the local disk that is to get another name."""
        os.makedirs(self._root, exist_ok=True)
        beside = self._path(f".{uuid4().hex}.dmixed")
        try:
            with open(beside, "wb") as stream:
                stream.write(content)
                if durable:
                    stream.flush()
                    os.fsync(stream.fileno())
            yield beside
        finally:
            with contextlib.suppress(OSError):
                os.unlink(beside)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _content(self, name: str, limit: int | None) -> bytes | None:
        path = self._path(name)
        if self.local:
            with open(path, "rb") as stream:
                if limit is not None and os.fstat(stream.fileno()).st_size > limit:
                    return None
                return stream.read()
        if limit is not None:
            self._fs.invalidate_cache()
            if self._fs.info(path)["size"] > limit:
                return None
        return bytes(self._fs.cat_file(path))


def lies_within(place: str, above: str) -> bool:
    """Whether files of a directory would be read as those of another or of a pattern.

    Nothing is read where a part of the path begins with "_" or ".".
    """
    outer = Folder.at(above.removeprefix("file://")).location.rstrip("/").split("/")
    inner = Folder.at(place.removeprefix("file://")).location.rstrip("/").split("/")
    if "**" in outer:
        outer = outer[: outer.index("**")]
    pairs = list(zip(outer, inner, strict=False))
    alike = len(inner) >= len(outer) and all(x == y or fnmatchcase(y, x) for x, y in pairs)
    below = inner[next((i for i, (x, y) in enumerate(pairs) if x != y), len(outer)) :]
    return alike and not any(x[:1] in ("_", ".") for x in below)


def _answer(error: OSError) -> str:
    """Code that a storage of S3's kind has answered with."""
    response = getattr(error.__cause__, "response", None)
    found = response.get("Error", {}).get("Code", "") if isinstance(response, dict) else ""
    return str(found)


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


@contextlib.contextmanager
def _plain_errors(options: Mapping[str, Any]) -> Iterator[None]:
    """Errors of storages, each of which has its own, as OSError without credentials."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        if error.filename is not None:
            raise
        raise type(error)(reason(error, options)) from None
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None and not options:
            raise
        raise OSError(reason(error, options)) from None


# --------------------------------------------------------------------------- workers


def check_workers(folder: Folder, client: Any) -> None:
    """Refuse a directory that the workers of a cluster do not share with this process.

    Raises
    ------
    DataError
        naming the directory and a worker
    OSError
        the directory cannot be written here
    """
    token = uuid4().hex
    name = f".{token}.dmixed"
    folder.put(name, token.encode())
    try:
        answers: dict[str, str | None] = client.run(_shared, folder, name, token)
    finally:
        folder.remove(name)
    for worker, why in answers.items():
        if why is not None:
            raise DataError(
                f"{folder.name}: the worker {worker} of the cluster cannot use it: {why}; give a "
                "directory on storage that all machines share"
            )


def _shared(folder: Folder, name: str, token: str) -> str | None:
    """What a worker calls: None if it sees the file and can write beside it, else why not."""
    own = f".{uuid4().hex}.dmixed"
    try:
        if folder.size(name) is None or folder.read(name) != token.encode():
            return f"the directory is another one on {platform.node()}"
        folder.put(own, b"")
        folder.remove(own)
    except Exception as error:  # whatever a storage raises, or that it is not installed there
        return str(error)
    return None
