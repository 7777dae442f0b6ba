from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import dump_config, load_config, parse_config, schema_json
from cluster.core.errors import ConfigError

MINIMAL = "models: [{name: tiny, path: weights}]\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return path


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, origin=Path("/deploy/cluster.yaml"))
    return str(caught.value)


def test_relative_paths_start_at_the_config_file_wherever_the_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "configs"
    folder.mkdir()
    path = write(folder, MINIMAL + "auth: {tokens: {alice: secrets/alice}}\nstore: {dir: ../store}\ntelemetry: {trace_dir: traces}\n")
    monkeypatch.chdir(tmp_path)
    spec = load_config(path)
    assert spec.models[0].path == folder / "weights"
    assert spec.auth.tokens == {"alice": folder / "secrets" / "alice"}
    assert spec.store.dir == tmp_path / "store"
    assert spec.telemetry.trace_dir == folder / "traces"
    assert spec.control.state_dir is None


def test_absolute_paths_stay() -> None:
    assert parse_config("models: [{name: a, path: /weights}]", origin=Path("/x/y.yaml")).models[0].path == Path("/weights")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (MINIMAL + "actors: {slots_per_acter: 1}", ["actors.slots_per_acter", "unknown key", "did you mean `slots_per_actor`?"]),
        ("models: [{name: a, path: b, repliccas: 2}]", ["models.0.repliccas", "unknown key", "`replicas`"]),
        (MINIMAL + "zzz: 1", ["zzz", "unknown key", "known here: abft, actors, auth"]),
        ("name: x", ["models: missing"]),
        ("models: []", ["models:", "at least 1"]),
        ("models: [{name: a}]", ["models.0.path: missing"]),
        ("models: [{name: a, path: b, dtype: int8}]", ["models.0.dtype"]),
        ("models: [{name: ../a, path: b}]", ["models.0.name"]),
        (MINIMAL + "router: {port: 99999}", ["router.port", "65535"]),
        (MINIMAL + "actors: {count: 0}", ["actors.count", "greater than 0"]),
        ("models: [{name: a, path: b}, {name: a, path: c}]", ["two models have the same name"]),
        ("models: [{name: a, path: b, ladder: [shadow, dense, dense]}]", ["models.0.ladder: dense stands there twice; name each rung once"]),
        ("models: [{name: a, path: b, ladder: [dense, shadow]}]", ["models.0.ladder: shadow must come first, if at all", "move it to the front"]),
        ("[1, 2]", ["a mapping is needed"]),
        ("", ["a mapping is needed"]),
        ("models: [", ["not YAML"]),
        ("models: !!python/object/apply:os.system [id]", ["not YAML"]),
    ],
)
def test_a_wrong_config_is_refused_with_place_and_remedy(text: str, named: list[str]) -> None:
    message = refusal(text)
    assert message.startswith("/deploy/cluster.yaml")
    for part in named:
        assert part in message


@pytest.mark.parametrize("ladder", ["[]", "[dense]", "[shadow]", "[shadow, generalist, dense, fewer_experts]", "[fewer_experts, dense]"])
def test_a_ladder_with_any_rungs_once_and_shadow_first_is_taken(ladder: str) -> None:
    spec = parse_config(f"models: [{{name: a, path: b, ladder: {ladder}}}]", origin=Path("/x/y.yaml"))
    assert list(spec.models[0].ladder) == yaml.safe_load(ladder)


def test_every_error_of_a_config_is_named_at_once() -> None:
    message = refusal("models: [{name: a}]\nactors: {nope: 1}\nrouter: {port: x}")
    assert [line.split(": ")[1] for line in message.splitlines()] == ["models.0.path", "actors.nope", "router.port"]


def test_a_missing_or_binary_or_huge_file_is_refused_by_name(tmp_path: Path) -> None:
    binary, huge = tmp_path / "binary.yaml", tmp_path / "huge.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    huge.write_bytes(b"#" * (1 << 20) + b"##")
    for path, reason in ((tmp_path / "none.yaml", "No such file"), (binary, "not UTF-8"), (huge, "larger than")):
        with pytest.raises(ConfigError, match=reason) as caught:
            load_config(path)
        assert str(path) in str(caught.value)


def test_a_dumped_spec_reads_back_equal(tmp_path: Path) -> None:
    spec = load_config(write(tmp_path, MINIMAL + "actors: {count: 3, num_gpus: 0.25}\nrouter: {port: 0}\nauth: {tokens: {a: t}}\n"))
    assert parse_config(dump_config(spec), origin=Path("/elsewhere/c.yaml")) == spec


@given(st.text(max_size=200))
def test_any_text_is_a_spec_or_a_config_error(text: str) -> None:
    try:
        parse_config(text, origin=Path("/deploy/cluster.yaml"))
    except ConfigError as error:
        assert "cluster.yaml" in str(error)  # noqa: PT017  # either outcome is right, other exceptions are not


def test_the_printed_schema_names_every_section_and_forbids_unknown_keys() -> None:
    schema = json.loads(schema_json())
    assert {"name", "models", "actors", "link", "router", "control", "auth", "telemetry", "store"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False
