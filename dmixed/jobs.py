"""The job file of a scheduled refit: YAML that is checked, each error with the line it is in.

What a job file says is not trusted: nothing in it is run, see `plainyaml`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from dmixed.errors import DataError, FormulaError, JobError
from dmixed.folders import lies_within
from dmixed.formula import parse
from dmixed.plainyaml import Yaml, dotted, read_yaml
from dmixed.sources.filters import OPERATORS, make_filter

SCHEMA = "dmixed-refit/1"

PLACES = ("data", "store", "publish", "scheduler")
"""Fields in which ``${NAME}`` stands for an environment variable."""

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SECRET = re.compile(
    r"storage_options|secret|passw|token|credential|access_?key|account_?key|api_?key"
    r"|connection_?string|\bsas\b|^key$",
    re.IGNORECASE,
)
_SECRET_IN_URI = re.compile(
    r"://[^/@\s]*:[^/@\s]*@|[?&](sig|token|secret|password|x-amz-[a-z-]+|[a-z_]*key)=",
    re.IGNORECASE,
)
_NO_SECRETS = (
    "a job file holds no credentials and no storage options: it is kept, copied and logged. They "
    "come from the environment or the role of the machine, as AWS_PROFILE, or "
    "FSSPEC_S3_ENDPOINT_URL for an endpoint"
)
_CONDITION = {
    "type": "array",
    "prefixItems": [
        {"type": "string", "description": "column"},
        {"enum": list(OPERATORS)},
        {"description": "value, or a list of values for 'in' and 'not in'"},
    ],
    "minItems": 3,
    "maxItems": 3,
}


def _conditions(found: list[Any]) -> list[Any]:
    """Conditions (column, operator, value) of which all must hold."""
    for position, condition in enumerate(found):
        if not isinstance(condition, list) or len(condition) != 3:
            why = "must be a list of [column, operator, value]"
            raise PydanticCustomError("condition", why, {"position": position})
    try:
        make_filter([tuple(condition) for condition in found])
    except DataError as error:
        raise PydanticCustomError("condition", "{why}", {"why": str(error)}) from None
    return found


Text: TypeAlias = Annotated[str, Field(min_length=1)]
Count: TypeAlias = Annotated[int, Field(ge=1)]
Conditions: TypeAlias = Annotated[
    list[Any],
    Field(min_length=1),
    AfterValidator(_conditions),
    WithJsonSchema({"type": "array", "items": _CONDITION, "minItems": 1}),
]


class Drift(BaseModel):
    """When estimates count as drifted, and what follows."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    limit: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = Field(
        default=3.0,
        description="Largest change of an estimate since the published version, in units of its "
        "standard error then; null for no limit.",
    )
    action: Literal["publish", "hold"] = Field(
        default="publish",
        description="Beyond the limit: publish all the same, or hold the version back until "
        "`dmixed refit --accept`. The exit status is 4 in both cases.",
    )


class Job(BaseModel):
    """A scheduled refit; fields as they stand in the file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    # "schema" is the name of a method of pydantic's
    schema_: Literal["dmixed-refit/1"] = Field(
        alias="schema", description="Version of this format."
    )
    formula: Text = Field(description="Model in lme4's spelling.")
    data: Text = Field(
        description="Parquet file, folder, glob or URI of one, or a Delta table. ${NAME} is an "
        "environment variable; a relative path is relative to this file."
    )
    store: Text = Field(description="Folder or URI of the moments; the first run makes it.")
    publish: Text = Field(description="Folder or URI of the results.")
    reml: bool = Field(default=True, description="REML, or maximum likelihood.")
    weights: Text | None = Field(default=None, description="Column of weights.")
    offset: Text | None = Field(default=None, description="Column of a known addition.")
    missing: Literal["drop", "raise", "none"] = Field(
        default="drop", description="Rows with missing values: drop and count them, or stop."
    )
    filters: Conditions | None = Field(
        default=None, description="Use the rows where all of [column, operator, value] hold."
    )
    carry: list[Text] = Field(
        default_factory=list, description="Terms to sum by group beside those of the formula."
    )
    group_crossproducts: bool = Field(
        default=False,
        description="Sum all columns by group, so that a group can be taken out again.",
    )
    window: Count | None = Field(default=None, description="Fit the last N appends only.")
    changed: Literal["error", "replace"] = Field(
        default="error",
        description="Files that changed since they were summed: stop, or sum them anew.",
    )
    vanished: Literal["keep", "error"] = Field(
        default="keep", description="Files that are gone: keep their rows, or stop."
    )
    keep: Count = Field(default=30, description="Published versions that are kept.")
    drift: Drift = Field(default=Drift(), description="When estimates count as drifted.")
    scheduler: Text | None = Field(
        default=None,
        description="Dask scheduler, tcp://host:port; --scheduler and DASK_SCHEDULER_ADDRESS go "
        "before it.",
    )

    @property
    def model(self) -> str:
        """Checksum of what decides which model is fitted to which rows of the store."""
        names = ("formula", "reml", "weights", "offset", "missing", "filters", "window")
        fields = {name: getattr(self, name) for name in names}
        return hashlib.sha256(json.dumps(fields, default=str).encode()).hexdigest()

    @property
    def conditions(self) -> list[tuple[str, str, Any]] | None:
        """``filters`` as `open_source` takes them."""
        return None if self.filters is None else [tuple(x) for x in self.filters]

    def with_places(self, **places: str) -> Self:
        """The same with other places."""
        return self.model_copy(update=places)


def job_schema() -> dict[str, Any]:
    """JSON Schema of job files, for editors and ``check-jsonschema``."""
    found = Job.model_json_schema(by_alias=True)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **found,
        "title": "dmixed refit job",
    }


def read_job(path: str | os.PathLike[str], environment: Mapping[str, str] | None = None) -> Job:
    """The job of a file, with environment variables in place and absolute paths.

    Parameters
    ----------
    environment
        variables; those of the process by default

    Raises
    ------
    JobError
        naming file, line and field of everything that is wrong
    """
    file, name = Path(path), os.fspath(path)
    found = read_yaml(file, name)
    try:
        job = Job.model_validate(found.plain)
    except ValidationError as error:
        raise JobError(_problems(error.errors(include_url=False), found, name)) from None
    own = _Checks(found, name, os.environ if environment is None else environment)
    job = own.placed(job, file.absolute().parent)
    own.formula(job)
    own.apart(job)
    if own.problems:
        raise JobError([text for _, text in sorted(own.problems)])
    return job


# --------------------------------------------------------------------------- messages


def _problems(errors: Sequence[ErrorDetails], found: Yaml, name: str) -> list[str]:
    """A line for everything that is wrong, in the order of the file."""
    told: list[tuple[int, str]] = []
    for error in errors:
        path = error["loc"]
        if error["type"] == "condition":
            position = error.get("ctx", {}).get("position")
            path = path if position is None else (*path, position)
        line = found.line(path)
        told.append((line, f"{name}:{line}: {_message(error, path)}"))
    return [text for _, text in sorted(dict.fromkeys(told))]


def _message(error: ErrorDetails, path: Sequence[str | int]) -> str:
    field, kind = dotted(path), error["type"]
    if kind == "extra_forbidden":
        return _unknown(str(path[-1]), field, Drift if len(path) > 1 else Job)
    if kind == "missing":
        return f"the field {field!r} is missing"
    if error["input"] is None and kind != "condition":
        return f"{field}: must have a value"
    message = error["msg"]
    if kind == "literal_error":
        message = f"must be {error['ctx']['expected']}, not {error['input']!r}"
    for before, after in (("Input should be ", "must be "), ("String should ", "must ")):
        message = message.replace(before, after)
    return f"{field}: {message}"


def _unknown(key: str, field: str, model: type[BaseModel]) -> str:
    if _SECRET.search(key):
        return f"{field!r} is refused: {_NO_SECRETS}"
    known = [info.alias or name for name, info in model.model_fields.items()]
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"fields here are {', '.join(known)}"
    return f"unknown field {field!r}: {hint}"


# --------------------------------------------------------------------------- beyond types


class _Checks:
    """What no schema says: variables, paths, and that the formula can be read."""

    def __init__(self, found: Yaml, name: str, environment: Mapping[str, str]) -> None:
        self.found, self.name, self.environment = found, name, environment
        self.problems: list[tuple[int, str]] = []

    def refuse(self, field: str, why: str) -> None:
        """Note a problem with a field."""
        line = self.found.line((field,))
        self.problems.append((line, f"{self.name}:{line}: {field}: {why}"))

    def placed(self, job: Job, base: Path) -> Job:
        """The job with its variables in place, and its paths relative to the file's folder."""
        places: dict[str, str] = {}
        for field in PLACES:
            given = getattr(job, field)
            if given is None:
                continue
            text = self._expanded(field, given)
            if _SECRET_IN_URI.search(text):
                self.refuse(field, _NO_SECRETS)
            elif field != "scheduler" and "://" not in text:
                text = os.path.normpath(base / os.path.expanduser(text))
            places[field] = text
        return job.with_places(**places)

    def _expanded(self, field: str, text: str) -> str:
        for name in _VARIABLE.findall(text):
            if not self.environment.get(name):
                self.refuse(field, f"the environment variable {name} is not set")
        text = _VARIABLE.sub(lambda found: self.environment.get(found[1], ""), text)
        if "${" in text:
            self.refuse(field, "a variable is written ${NAME}, of letters, digits and '_'")
        return text

    def formula(self, job: Job) -> None:
        """Refuse a formula that cannot be read."""
        try:
            parse(job.formula)
        except FormulaError as error:
            self.refuse("formula", " ".join(str(error).split()))

    def apart(self, job: Job) -> None:
        """Refuse places that lie in each other: results would be read as data."""
        for field, others in (("store", ("data",)), ("publish", ("data", "store"))):
            for other in others:
                place, above = getattr(job, field), getattr(job, other)
                if lies_within(place, above):
                    self.refuse(field, f"lies within the folder of {other}: choose another one")
        if lies_within(job.store, job.publish):
            self.refuse("store", "lies within the folder of publish: choose another one")
