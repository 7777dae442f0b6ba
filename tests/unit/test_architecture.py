"""What keeps the code base readable, checked: sizes, names, empty packages, pure cores, light imports, no unpickling anywhere."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("cluster", "actors", "router_service", "chaos", "protos")
FOLDERS = (*PRODUCT, "examples", "tests")
CORES = ("cluster/core", "actors/core", "router_service/core", "chaos/core")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
IMPURE_MODULES = {"ray", "grpc", "asyncio", "threading", "time", "logging", "opentelemetry", "socket", "subprocess"}
# numpy and pydantic load some of the standard library's; these are never loaded by accident.
HEAVY_MODULES = {"ray", "grpc", "opentelemetry"}
UNPICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all", "os.system"}
# Module: what importing it must not load.
LIGHT_MODULES = {
    "router_service.client": {"ray", "torch", "transformers"},
    "cluster.cli.app": {"ray", "torch", "transformers", "grpc", "numpy"},
    "cluster.config": {"ray", "torch", "grpc", "numpy"},
    "cluster.controller": {"ray", "torch", "transformers"},
    "cluster.registry.checkpoint": {"ray", "torch", "transformers", "grpc"},
    "actors.expert_store": {"ray", "torch", "transformers", "grpc"},
    "actors.node_agent": {"ray", "torch", "transformers"},
}


def python_files(folders: tuple[str, ...] = FOLDERS) -> Iterator[Path]:
    """Every tracked or new Python file of ours; what git ignores is not ours, generated code is not read by people."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.suffix == ".py" and not path.stem.endswith(("_pb2", "_pb2_grpc")) and path.is_file():
            yield path


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_modules(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_the_walk_finds_the_code() -> None:
    found = {shown(path) for path in python_files()}
    assert {"cluster/core/ids.py", "tests/unit/test_architecture.py"} <= found


def test_no_file_is_longer_than_its_limit() -> None:
    sizes = {shown(path): len(path.read_text().splitlines()) for path in python_files()}
    assert {name: lines for name, lines in sizes.items() if lines > MAX_FILE_LINES} == {}


def test_no_function_is_longer_than_its_limit() -> None:
    long = {}
    for path in python_files():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long[f"{shown(path)}:{node.name}"] = lines
    assert long == {}


def test_modules_and_folders_are_named_after_what_they_hold() -> None:
    vague = {shown(path) for path in python_files() if VAGUE_NAMES & {*path.relative_to(ROOT).parts[:-1], path.stem, *path.stem.split("_")}}
    assert vague == set()


def test_package_files_are_empty_and_every_product_folder_has_one() -> None:
    files = list(python_files(PRODUCT))
    assert [shown(path) for path in files if path.name == "__init__.py" and path.read_text().strip()] == []
    assert {shown(path.parent) for path in files if not (path.parent / "__init__.py").is_file()} == set()


def test_there_is_no_package_file_under_tests() -> None:
    assert [shown(path) for path in python_files(("tests",)) if path.name == "__init__.py"] == []


def test_core_modules_import_nothing_that_does_io() -> None:
    impure = {}
    for path in python_files(CORES):
        named = {name.partition(".")[0] for name in imported_modules(tree(path))} & IMPURE_MODULES
        if named:
            impure[shown(path)] = named
    assert impure == {}


def modules_of(folder: str) -> list[str]:
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in python_files((folder,)) if path.name != "__init__.py"]


def loaded_after(modules: list[str], watched: set[str]) -> dict[str, list[str]]:
    """Import modules one after the other in one fresh process: for each, which of the watched packages it was the first to load."""
    script = """
import importlib, json, sys
modules, watched = json.load(sys.stdin)
first = {}
for name in modules:
    before = {top for top in watched if top in sys.modules}
    importlib.import_module(name)
    new = sorted({top for top in watched if top in sys.modules} - before)
    if new:
        first[name] = new
print(json.dumps(first))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, input=json.dumps([modules, sorted(watched)]), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, list[str]] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("core", CORES)
def test_importing_a_core_loads_no_service_library(core: str) -> None:
    watched = HEAVY_MODULES | ({"torch"} if core == "cluster/core" else set())
    assert loaded_after(modules_of(core), watched) == {}


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_light_modules_load_no_heavy_library(module: str) -> None:
    assert loaded_after([module], LIGHT_MODULES[module]) == {}


def called_name(node: ast.Call) -> str:
    match node.func:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=ast.Name(id=owner), attr=name):
            return f"{owner}.{name}"
    return ""


def test_nothing_in_product_code_unpickles_or_evaluates() -> None:
    unsafe = set()
    for path in python_files((*PRODUCT, "examples")):
        module = tree(path)
        unsafe |= {f"{shown(path)} imports {name}" for name in imported_modules(module) if name.partition(".")[0] in UNPICKLERS}
        for node in ast.walk(module):
            if isinstance(node, ast.Call):
                if called_name(node) in UNSAFE_CALLS:
                    unsafe.add(f"{shown(path)}:{node.lineno} calls {called_name(node)}")
                unsafe |= {f"{shown(path)}:{node.lineno} passes {word.arg}" for word in node.keywords if word.arg == "allow_pickle"}
    assert unsafe == set()


def requirement_lines() -> Iterator[tuple[str, str]]:
    """Name and whole line of every requirement in pyproject.toml."""
    for line in (ROOT / "pyproject.toml").read_text().splitlines():
        found = re.match(r'\s+"([A-Za-z0-9_-]+)(\[[a-z]+\])?[<>=]', line)
        if found:
            yield found.group(1).lower().replace("_", "-"), line


def test_every_direct_dependency_is_pinned_and_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = dict(requirement_lines())
    assert len(required) == len(project["dependencies"]) + sum(len(group) for group in project["optional-dependencies"].values())
    assert [name for name in (*required,) if name in str(project["dependencies"]).lower() and "#" not in required[name]] == []
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert set(required) - pinned == set()
