"""Settings: precedence, bounds, and every problem at once."""

from pathlib import Path

import pytest

from tokenwire.config import Settings
from tokenwire.config_sources import ConfigError, load_settings


def problems_of(**sources: object) -> str:
    sources.setdefault("environ", {})
    with pytest.raises(ConfigError) as caught:
        load_settings(**sources)  # type: ignore[arg-type]
    return "\n".join(caught.value.problems)


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "tokenwire.toml"
    file.write_text("port = 1\nmax_tokens_out = 2\nmax_queued_jobs = 3\n")
    environ = {"TOKENWIRE_PORT": "10", "TOKENWIRE_MAX_TOKENS_OUT": "20"}
    settings = load_settings({"port": 100, "max_tokens_out": None}, file, environ)
    assert (settings.port, settings.max_tokens_out, settings.max_queued_jobs) == (100, 20, 3)
    assert settings.drain_seconds == 30


def test_all_problems_are_reported_at_once_with_their_source(tmp_path: Path) -> None:
    file = tmp_path / "tokenwire.toml"
    file.write_text('kv_cache_size_mb = "10GB "\nno_such_thing = 1\n')
    text = problems_of(
        flags={"port": 70000, "host": "0.0.0.0"}, config_file=file, environ={"TOKENWIRE_BATCH_WINDOW_MS": "-1"}
    )
    assert len(text.splitlines()) == 5
    assert "host" in text
    assert "port (from --port)" in text
    assert "batch_window_ms (from TOKENWIRE_BATCH_WINDOW_MS)" in text
    assert f"kv_cache_size_mb (from {file})" in text
    assert f"no_such_thing (from {file}): no such setting" in text


@pytest.mark.parametrize("content", ["port = ", "\x00", "= 1"])
def test_a_broken_file_is_a_problem_not_a_crash(tmp_path: Path, content: str) -> None:
    file = tmp_path / "tokenwire.toml"
    file.write_text(content)
    assert "not valid TOML" in problems_of(config_file=file)


def test_a_missing_file_is_a_problem(tmp_path: Path) -> None:
    assert "cannot be read" in problems_of(config_file=tmp_path / "absent.toml")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_permission(host: str) -> None:
    assert load_settings({"host": host}, environ={}).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", "localhost.example.org"])
def test_other_addresses_are_refused(host: str) -> None:
    assert "needs allow_remote" in problems_of(flags={"host": host})


def test_allow_remote_without_a_credential_is_refused() -> None:
    assert "needs API keys" in problems_of(flags={"host": "0.0.0.0", "allow_remote": True})


def test_a_kubernetes_service_link_is_not_a_port() -> None:
    assert load_settings(environ={"TOKENWIRE_PORT": "tcp://10.0.0.7:50051"}).port == 50051


@pytest.mark.parametrize(
    ("name", "value"),
    [("inference_timeout_sec", "nan"), ("inference_timeout_sec", "inf"), ("drain_seconds", "-1"), ("port", "1.5")],
)
def test_numbers_out_of_bounds_are_refused(name: str, value: str) -> None:
    assert name in problems_of(environ={f"TOKENWIRE_{name.upper()}": value})


@pytest.mark.parametrize(
    ("flags", "device"),
    [
        ({"device": "auto"}, None),
        ({"device": "cpu"}, None),
        ({"device": "cuda"}, "cuda:0"),
        ({"device": "cuda:3"}, "cuda:3"),
        ({"device": "cuda", "gpu_device": 2}, "cuda:2"),
    ],
)
def test_device_names_a_cuda_device(flags: dict[str, object], device: str | None) -> None:
    assert load_settings(flags, environ={}).cuda_device == device


def test_gpu_device_contradicting_device_is_refused() -> None:
    assert "gpu_device" in problems_of(flags={"device": "cpu", "gpu_device": 0})


def test_every_setting_has_help_and_bounds() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        if field.annotation in (int, float):
            assert field.metadata, f"{name} has no bounds"


def test_the_transport_limits_in_the_documentation_are_these() -> None:
    text = (Path(__file__).parents[2] / "docs" / "limits.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.partition("## Transport")[2].splitlines() if line.startswith("| `")]
    assert len(rows) == 10
    for _, name, default, description, _ in rows:
        field = Settings.model_fields[name.strip(" `")]
        assert (default.strip(), description.strip()) == (str(field.default), field.description)
