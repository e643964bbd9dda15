"""Storages that fsspec knows: what they say when they refuse, in one line without credentials."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from typing import Any

BUCKETS = {
    "s3", "s3a", "gs", "gcs", "az", "adl", "abfs", "abfss", "oss", "r2",
}  # fmt: skip
"""Protocols of storages without directories: to make one would make a bucket."""

# Each storage has errors of its own, by which classes and words are told apart.
_REFUSED = re.compile(
    r"credential|forbidden|access.?denied|permission|signature|unauthori[sz]ed|authenticat"
    r"|authori[sz]ation|(token|session|key).*expired",
    re.IGNORECASE,
)
_SILENT = re.compile(
    r"service unavailable|reduce your request rate|slow ?down|internal ?error|timed? ?out"
    r"|connect|reset by peer|bad gateway|error sending request",
    re.IGNORECASE,
)
_NO_BUCKET = re.compile(r"(bucket|container) does not exist|NoSuchBucket", re.IGNORECASE)
_BAD = re.compile(r"bad request|bucket.* not valid|invalid ?bucket", re.IGNORECASE)
_BUSY = {errno.EBUSY, errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE}


def redact(text: str, options: Mapping[str, Any] | None = None) -> str:
    """Text without the credentials that URIs and storage options may hold."""
    text = re.sub(r"(?<=://)[^/@\s]*@", "", text)
    text = re.sub(r"(https?://[^\s?]*)\?\S*", r"\1", text)
    for secret in _secrets(options or {}):
        text = text.replace(secret, "***")
    return text


def _secrets(value: Any) -> list[str]:
    """Texts in storage options that a message must not repeat."""
    if isinstance(value, Mapping):
        return [s for k, v in value.items() if "endpoint" not in str(k) for s in _secrets(v)]
    return [value] if isinstance(value, str) and len(value) > 3 else []


def reason(error: Exception, options: Mapping[str, Any] | None = None, kind: bool = True) -> str:
    """What an error of a storage says, in one line without credentials, and what to do.

    Parameters
    ----------
    options
        storage options, of which nothing is repeated
    kind
        whether the class of the error comes first; it does where the error says nothing
    """
    lines = redact(str(error), options).strip().splitlines()
    name = type(error).__name__
    text = f"{name}: {lines[0]}" if lines and kind else lines[0] if lines else name
    what = _what_to_do(error, f"{name}: {lines[0] if lines else ''}")
    return f"{text.rstrip(' .')}; {what}" if what else text


def _what_to_do(error: Exception, text: str) -> str:
    """Advice for errors of remote storages; none for those of local files."""
    if isinstance(error, OSError) and error.filename is not None:
        return ""
    if _NO_BUCKET.search(text):
        return "check its name, or make it"
    if isinstance(error, PermissionError) or _REFUSED.search(text):
        return "check the credentials, and what they are allowed to do"
    number = error.errno if isinstance(error, OSError) else None
    if number in _BUSY or isinstance(error, ConnectionError | TimeoutError) or _SILENT.search(text):
        return "check the address of the storage, or start again when it answers"
    if _BAD.search(text):
        return "check the name of the bucket, the region and the credentials"
    return ""
