"""Versions of results in a directory or object store, and the pointer to the one that counts.

    current.json                    the pointer, see `Pointer`; replaced as a whole, last
    000012-3f2a9c1b04d5/            a version; its name follows from the store and the job
        version.json                see `Version`; created once, when its files are there
        8b1e22aa/result.json, ...   files; a folder for every attempt, of which one is named

A process can be killed at any instant, and two can be at work: files belong to the attempt that
writes them, one attempt makes the version, and readers see it when the pointer names it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import uuid4

from dmixed.blocks import Floats
from dmixed.drift import Estimate, Rows
from dmixed.errors import DataError
from dmixed.folders import UNNAMED, Folder
from dmixed.records import made_record, record_bytes

CURRENT, VERSION, TABLES = "current.json", "version.json", "random_effects"
CURRENT_SCHEMA, VERSION_SCHEMA = "dmixed-refit-current/1", "dmixed-refit-version/1"

VERSION_ID = re.compile(r"\d{6,}-[0-9a-f]{12}")
ATTEMPT = re.compile(r"[0-9a-f]{8}")

SIZE = 2**26
"""Bytes of a record at most."""

ORPHAN = 86_400.0
"""Seconds after which files of no version are not being written any more."""


@dataclass(frozen=True, slots=True)
class Factor:
    """Table of random effects of a factor: its label, and in which files and columns.

    Attributes
    ----------
    label
        "g", "h:g", the name of a component
    files, sizes
        below ``random_effects``, and their bytes
    keys
        columns that tell levels apart
    """

    label: str
    files: tuple[str, ...]
    sizes: tuple[int, ...]
    keys: tuple[str, ...]

    def __post_init__(self) -> None:
        assert len(self.files) == len(self.sizes)


@dataclass(frozen=True, slots=True)
class Version:
    """Contents of ``version.json``: all that the next run needs to know of this one.

    Attributes
    ----------
    id
        name of the version
    attempt
        folder of its files below it
    model
        see `Job.model`
    store_version, deltas
        state of the store, and ids of what its moments were made of
    before
        version that it was compared with
    formula, llf, rows
        of the fit
    largest
        largest change of an estimate, standard errors
    labels
        of the random columns, in the order of Psi
    Psi
        (q, q) relative covariance, user units
    estimates
        all of them
    factors
        tables of random effects
    files
        checksums of its files but those of tables
    """

    schema: str
    id: str
    attempt: str
    model: str
    store_version: int
    deltas: tuple[str, ...]
    before: str | None
    formula: str
    llf: float
    rows: Rows
    largest: float
    labels: tuple[str, ...]
    Psi: Floats
    estimates: tuple[Estimate, ...]
    factors: tuple[Factor, ...]
    files: dict[str, str]


@dataclass(frozen=True, slots=True)
class Pointer:
    """Contents of ``current.json``.

    Attributes
    ----------
    version, folder
        the version that counts, and where its files are, relative to the pointer
    published
        when, ISO 8601, UTC
    store_version
        state of the store that it is of
    history
        versions that are kept, the newest first
    """

    schema: str
    version: str
    folder: str
    published: str
    store_version: int
    history: tuple[str, ...]


class Attempt:
    """A folder for the files of a version that is being made."""

    def __init__(self, folder: Folder, version: str) -> None:
        self.name = uuid4().hex[:8]
        self.folder = folder.below(version).below(self.name)
        self.files: dict[str, str] = {}

    def put(self, name: str, content: bytes) -> None:
        """Write a file."""
        self.folder.put(name, content)
        self.note(name, content)

    def note(self, name: str, content: bytes) -> None:
        """Remember the checksum of a file that is there."""
        self.files[name] = hashlib.sha256(content).hexdigest()


class Published:
    """A directory of versions; see the module."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    # ------------------------------------------------------------------ reading

    def current(self) -> Pointer | None:
        """The pointer, None before the first version.

        Raises
        ------
        DataError
            naming the file that is damaged
        OSError
            the storage does not say
        """
        if self.folder.size(CURRENT) is None:
            return None
        file = self.folder.file(CURRENT)
        hint = "; remove it to publish anew, without a comparison"
        try:
            found = made_record(Pointer, self.folder.read(CURRENT, SIZE), file, CURRENT_SCHEMA)
        except DataError as error:
            raise DataError(f"{error}{hint}") from None
        right = found.folder.split("/")[:1] == [found.version] == list(found.history[:1])
        if not right or not all(VERSION_ID.fullmatch(name) for name in found.history):
            raise DataError(f"{file}: names versions that cannot be{hint}")
        return found

    def version(self, name: str) -> Version | None:
        """What a version is; None if it is not complete.

        Raises
        ------
        DataError
            naming the file that is damaged
        OSError
            the storage does not say
        """
        folder = self.folder.below(name)
        if folder.size(VERSION) is None:
            return None
        file = folder.file(VERSION)
        try:
            found = made_record(Version, folder.read(VERSION, SIZE), file, VERSION_SCHEMA)
        except DataError as error:
            raise DataError(f"{error}; remove that folder, and what it has is made anew") from None
        q = len(found.labels)
        tables = [name for factor in found.factors for name in factor.files]
        if found.id != name or not ATTEMPT.fullmatch(found.attempt) or found.Psi.size != q * q:
            raise DataError(f"{file}: is not that of {name}")
        if any(part in ("", ".", "..") for name in tables for part in name.split("/")):
            raise DataError(f"{file}: names files outside of its folder")
        return found

    def files(self, version: Version) -> Folder:
        """Where the files of a version are."""
        return self.folder.below(version.id).below(version.attempt)

    def check(self, version: Version) -> None:
        """Refuse a version whose files are not as they were written.

        Raises
        ------
        DataError
            naming the file, which is missing or damaged
        """
        folder = self.files(version)
        hint = f"; remove the folder {version.id} of results, and it is made anew"
        try:
            for name, checksum in version.files.items():
                if hashlib.sha256(folder.read(name, SIZE)).hexdigest() != checksum:
                    file = folder.file(name)
                    raise DataError(f"{file}: is damaged or was changed: its checksum is wrong")
            for factor in version.factors:
                for name, size in zip(factor.files, factor.sizes, strict=True):
                    path = f"{TABLES}/{name}"
                    if folder.size(path) != size:
                        raise DataError(f"{folder.file(path)}: is missing or damaged")
        except DataError as error:
            raise DataError(f"{error}{hint}") from None

    # ------------------------------------------------------------------ writing

    def attempt(self, name: str) -> Attempt:
        """A new folder for the files of a version."""
        return Attempt(self.folder, name)

    def add(self, version: Version) -> Version:
        """Make a version of the files of an attempt, or return what another process has made.

        Raises
        ------
        OSError
            it cannot be written
        """
        folder = self.folder.below(version.id)
        if folder.create(VERSION, record_bytes(version)):
            return version
        other = self.version(version.id)
        if other is None:
            raise OSError(f"{folder.file(VERSION)}: was there and is gone")
        if other.attempt != version.attempt:
            folder.remove_folder(version.attempt)
        return other

    def publish(self, version: Version, keep: int) -> Pointer:
        """Let the pointer name a version, and remove those beyond the number to keep.

        Raises
        ------
        OSError
            it cannot be written, or old versions cannot be removed
        """
        before = self.current()
        history = () if before is None else before.history
        history = (version.id, *(name for name in history if name != version.id))
        pointer = Pointer(
            schema=CURRENT_SCHEMA,
            version=version.id,
            folder=f"{version.id}/{version.attempt}",
            published=datetime.now(UTC).isoformat(timespec="seconds"),
            store_version=version.store_version,
            history=history[:keep],
        )
        self.folder.put(CURRENT, record_bytes(pointer))
        for name in history[keep:]:
            self.folder.remove_folder(name)
        return pointer

    def tidy(self, but: str) -> None:
        """Remove what no pointer names and nobody is writing any more.

        Parameters
        ----------
        but
            a version that stays
        """
        pointer = self.current()
        kept = {but, *(() if pointer is None else pointer.history)}
        for name in self.folder.names():
            if VERSION_ID.fullmatch(name) and name not in kept:
                age = self.folder.youngest(name)
                if age is not None and age > ORPHAN:
                    self.folder.remove_folder(name)
            elif UNNAMED.fullmatch(name):
                age = self.folder.age(name)
                if age is not None and age > ORPHAN:
                    self.folder.remove(name)
