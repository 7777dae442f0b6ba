"""A YAML file becomes a ClusterSpec; every error names the place in the file, what is wrong and what would be right."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from cluster.core.errors import ConfigError
from cluster.core.spec import ClusterSpec

MAX_CONFIG_BYTES = 1 << 20
# Every path of the spec that names a file of the machine the config lies on; the others are folders that the nodes make.
_PATHS = (("models", "*", "path"), ("router", "tls_cert"), ("router", "tls_key"), ("auth", "tokens", "*"))
_FOLDERS = (("control", "state_dir"), ("telemetry", "trace_dir"), ("store", "dir"))


def load_config(path: Path) -> ClusterSpec:
    """Read a deployment from YAML; relative paths in it start at the file's own folder. Raises ConfigError, one line for each thing that is wrong."""
    return parse_config(_read(path), origin=path)


def parse_config(text: str, *, origin: Path) -> ClusterSpec:
    """The same, from text; `origin` is the file it stands for."""
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        message = f"{origin}: not YAML: {str(error).replace(chr(10), ' ')}"
        raise ConfigError(message) from error
    if not isinstance(document, dict):
        message = f"{origin}: a mapping is needed, with at least `models`; `moelastic config schema` prints what may stand in it"
        raise ConfigError(message)
    try:
        spec = ClusterSpec.model_validate(document)
    except ValidationError as error:
        message = "\n".join(f"{origin}: {line}" for line in _lines(error))
        raise ConfigError(message) from error
    return _with_absolute_paths(spec, origin.resolve().parent)


def schema_json() -> str:
    """The JSON Schema of a config file."""
    return json.dumps(ClusterSpec.model_json_schema(), indent=2)


def dump_config(spec: ClusterSpec) -> str:
    """A spec as YAML that `parse_config` reads back."""
    return yaml.safe_dump(spec.model_dump(mode="json", exclude_unset=True), sort_keys=False)


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            message = f"{path}: larger than {MAX_CONFIG_BYTES} bytes; this is not a deployment"
            raise ConfigError(message)
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        message = f"{path}: cannot be read: {reason}; give the path of a YAML file"
        raise ConfigError(message) from error


def _lines(error: ValidationError) -> Iterable[str]:
    problems = error.errors(include_url=False, include_input=False)
    for problem in problems:
        if _is_consequence(problem["loc"], (other["loc"] for other in problems)):
            continue
        place = tuple(part for part in problem["loc"] if not _is_union_branch(part))
        key = ".".join(str(part) for part in place) or "(top)"
        if problem["type"] == "extra_forbidden":
            yield f"{key}: unknown key; {_known_keys(place)}"
        elif problem["type"] == "missing":
            yield f"{key}: missing; it has no default"
        else:
            yield f"{key}: {problem['msg'].removeprefix('Value error, ')}"


def _is_consequence(place: tuple[Any, ...], others: Iterable[tuple[Any, ...]]) -> bool:
    """Whether the error is only there because of one further inside: a list counts as too short without its wrong entries."""
    return bool(place) and any(len(other) > len(place) and other[: len(place)] == place for other in others)


def _is_union_branch(part: object) -> bool:
    """Pydantic puts the name of a union's branch into the place, which nobody wrote in the file."""
    return isinstance(part, str) and (part.startswith(("literal[", "lax-or-strict", "is-instance")) or part in {"DType", "enum"})


def _known_keys(place: tuple[Any, ...]) -> str:
    section = _section(ClusterSpec, place[:-1])
    known = sorted(section.model_fields) if section is not None else []
    close = difflib.get_close_matches(str(place[-1]), known, n=1)
    return f"did you mean `{close[0]}`?" if close else f"known here: {', '.join(known)}"


def _section(model: type[BaseModel], place: tuple[Any, ...]) -> type[BaseModel] | None:
    """The section of the schema that a place in the file belongs to."""
    for part in place:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(str(part))
        if field is None:
            return None
        candidates = (field.annotation, *get_args(field.annotation))
        inner = next((found for found in candidates if isinstance(found, type) and issubclass(found, BaseModel)), None)
        if inner is None:
            return None
        model = inner
    return model


def _with_absolute_paths(spec: ClusterSpec, base: Path) -> ClusterSpec:
    document = spec.model_dump(exclude_unset=True)
    for place in (*_PATHS, *_FOLDERS):
        _resolve(document, place, base)
    return ClusterSpec.model_validate(document)


def _resolve(node: Any, place: tuple[str, ...], base: Path) -> None:  # noqa: ANN401  # a parsed document
    """Make the paths at `place` absolute; `*` stands for every entry."""
    first, *rest = place
    if first == "*":
        keys: Iterable[Any] = list(node) if isinstance(node, Mapping) else range(len(node))
    else:
        keys = [first] if isinstance(node, Mapping) and node.get(first) is not None else []
    for key in keys:
        if rest:
            _resolve(node[key], tuple(rest), base)
        else:
            node[key] = (base / Path(node[key]).expanduser()).resolve()
