"""The deployment's files agree with the program: commands, options, settings, files, stages."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from cli.main import app
from core.settings import known_variables

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def _command_line(service: dict[str, Any]) -> list[str]:
    stage = _stage(service["build"]["target"])
    entry = re.search(r"^ENTRYPOINT \[(.*)\]$", stage, re.MULTILINE)
    assert entry is not None
    return [*re.findall(r'"([^"]*)"', entry[1]), *shlex.split(service["command"])]


def _stage(name: str) -> str:
    stages = re.split(r"^(?=FROM )", DOCKERFILE, flags=re.MULTILINE)
    (found,) = [stage for stage in stages if re.match(rf"FROM \S+ AS {name}$", stage, re.M)]
    return found


def test_the_parts_of_a_deployment_are_there() -> None:
    assert set(SERVICES) == {"postgres", "valkey", "migrate", "api", "steward", "worker"}
    assert set(OURS) == {"migrate", "api", "steward", "worker"}


@pytest.mark.parametrize("name", OURS)
def test_commands_and_options_exist(name: str) -> None:
    program, command, *rest = _command_line(OURS[name])
    assert program == "lorry"
    known = {option for param in COMMANDS[command].params for option in param.opts}
    assert {word for word in rest if word.startswith("--")} <= known


@pytest.mark.parametrize("name", OURS)
def test_settings_are_known(name: str) -> None:
    settings = {key for key in OURS[name]["environment"] if key.startswith("LORRY_")}
    assert settings <= known_variables()
    assert {"LORRY_DATABASE_URL", "LORRY_BROKER_URL", "LORRY_STORE_URL"} <= settings


def test_settings_in_the_images_are_known() -> None:
    assert set(re.findall(r"LORRY_[A-Z_]+", DOCKERFILE)) <= known_variables()


@pytest.mark.parametrize("name", ["postgres", "valkey", "api"])
def test_what_listens_is_checked(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")


def test_nothing_starts_before_what_it_needs() -> None:
    for service in OURS.values():
        for other, how in service["depends_on"].items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[other]
            else:
                assert how["condition"] == "service_completed_successfully"
                assert SERVICES[other]["restart"] == "on-failure"


def test_volumes_are_declared() -> None:
    named = {
        source
        for service in SERVICES.values()
        for source, _, _ in (volume.partition(":") for volume in service.get("volumes", ()))
        if re.fullmatch(r"[a-z]+", source)
    }
    assert named == set(COMPOSE["volumes"])


def test_the_worker_gets_a_gpu_and_time_to_drain() -> None:
    (device,) = SERVICES["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    grace = float(SERVICES["worker"]["environment"]["LORRY_GRACE_SECONDS"])
    assert int(SERVICES["worker"]["stop_grace_period"].removesuffix("s")) > grace


def test_only_keyed_requests_come_in() -> None:
    environment = SERVICES["api"]["environment"]
    assert environment.get("LORRY_REQUIRE_KEYS", "true") == "true"
    assert all(port.startswith("127.0.0.1:") for port in SERVICES["api"]["ports"])


def test_images_copy_what_exists_and_every_package() -> None:
    sources = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    copied = {source for line in sources for source in line.split()}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert packages <= copied
    assert all((ROOT / source).exists() for source in copied)
    allowed = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text()
    assert copied == set(re.findall(r"^!(.+)$", allowed, re.MULTILINE))
