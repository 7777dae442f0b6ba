"""Scenarios as files: read, check, find by name. Unknown keys are errors with their path; `${name}` stands for a value of `configuration`."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from chaos.core.experiment import Scenario
from chaos.core.report import unknown_assertions
from chaos.faults.table import fault_of
from chaos.probes.table import PROBES
from cluster.core.errors import ConfigError

SHIPPED = Path(__file__).resolve().parent / "scenarios"
MAX_BYTES = 1 << 20
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass(frozen=True, slots=True)
class ScenarioFile:
    """A scenario, its name (the file's) and the digest of what it says."""

    name: str
    path: Path
    scenario: Scenario
    digest: str


def find(given: str) -> Path:
    """The file of that path, or the shipped scenario of that name. Raises ConfigError."""
    path = Path(given)
    if path.suffix in {".yaml", ".yml"} or path.exists():
        return path
    shipped = SHIPPED / f"{given}.yaml"
    if not shipped.exists():
        message = f"{given}: neither a file nor a shipped scenario; shipped: {', '.join(names())}"
        raise ConfigError(message)
    return shipped


def names() -> list[str]:
    """The shipped scenarios."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load(path: Path) -> ScenarioFile:
    """Read and check a scenario: schema, faults and their targets, probes, assertions. Raises ConfigError, one line for each thing that is wrong."""
    try:
        if path.stat().st_size > MAX_BYTES:
            message = f"{path}: larger than {MAX_BYTES} bytes; this is not a scenario"
            raise ConfigError(message)
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        message = f"{path}: cannot be read as YAML: {str(error).replace(chr(10), ' ')}"
        raise ConfigError(message) from error
    if not isinstance(document, dict):
        message = f"{path}: a mapping is needed, with title, description, steady-state-hypothesis and method"
        raise ConfigError(message)
    configuration = document.get("configuration") or {}
    filled = _filled(document, configuration if isinstance(configuration, dict) else {}, path)
    try:
        scenario = Scenario.model_validate(filled)
    except ValidationError as error:
        problems = [f"{path}: {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False, include_input=False)]
        raise ConfigError("\n".join(problems)) from error
    _check_names(scenario, path)
    text = json.dumps(scenario.model_dump(mode="json"), sort_keys=True)
    return ScenarioFile(path.stem, path, scenario, hashlib.sha256(text.encode()).hexdigest()[:16])


def _filled(value: Any, configuration: dict[str, Any], path: Path) -> Any:  # noqa: ANN401  # a parsed document
    """The document with its `${name}` replaced; one that stands alone keeps its value's type. Raises ConfigError for a name that is not there."""
    if isinstance(value, dict):
        return {key: item if key == "configuration" else _filled(item, configuration, path) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, configuration, path) for item in value]
    if not isinstance(value, str):
        return value
    wanted = _VARIABLE.findall(value)
    if missing := [name for name in wanted if name not in configuration]:
        message = f"{path}: ${{{missing[0]}}} is not in `configuration`"
        raise ConfigError(message)
    whole = _VARIABLE.fullmatch(value.strip())
    return configuration[whole.group(1)] if whole else _VARIABLE.sub(lambda found: str(configuration[found.group(1)]), value)


def _check_names(scenario: Scenario, path: Path) -> None:
    for action in scenario.method:
        fault_of(action)
    probes = [*(probe.name for probe in scenario.steady_state.probes), *(rollback.name for rollback in scenario.rollbacks)]
    if unknown := sorted(set(probes) - set(PROBES)):
        message = f"{path}: unknown probe {unknown[0]}; known: {', '.join(sorted(PROBES))}"
        raise ConfigError(message)
    if unknown := unknown_assertions(scenario.assertions):
        message = f"{path}: assertions: nothing is measured as {unknown[0]}; `moelastic chaos list` names what is"
        raise ConfigError(message)
