"""Lorry's settings: `LORRY_*` variables, read when a process starts and never at import.

One table for all processes, since an operator sets them in one place and a misspelt name must be
refused by every command.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import platformdirs
from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from core.errors import UsageError
from core.webhook_addresses import Allowed

PREFIX = "LORRY_"
#: Read by the command line as a client, not by the services.
CLIENT_VARIABLES = {"LORRY_URL", "LORRY_API_KEY"}


class Settings(BaseSettings):
    """Every setting with its default. Durations are seconds, sizes are bytes."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    database_url: str | None = Field(None, description="Postgres, as postgresql://…")
    broker_url: str | None = Field(None, description="Celery broker, as redis://… or amqp://…")
    store_url: str | None = Field(None, description="where files are kept: a folder or s3://…")
    cache_dir: Path | None = Field(None, description="local copies of adapters and the demo base")

    lease_seconds: float = Field(30, gt=0, description="how long a silent worker keeps its jobs")
    sweep_seconds: float = Field(5, gt=0, description="pause between the steward's sweeps")
    poll_seconds: float = Field(2, gt=0, description="pause between looks without a doorbell")
    stall_seconds: float = Field(120, gt=0, description="silence after which an engine is stalled")
    quantum_seconds: float = Field(10, gt=0, description="longest drain while others wait")
    grace_seconds: float = Field(30, ge=0, description="time for running jobs when stopping")
    max_attempts: int = Field(3, ge=1, le=100, description="failed tries before a job fails")
    partitions: int = Field(32, ge=1, le=256, description="doorbell queues per base model")
    feed_factor: float = Field(1.5, ge=1, le=8, description="jobs in the engine / max_num_seqs")
    flush_seconds: float = Field(0.05, gt=0, description="longest wait of a result for its flush")
    flush_results: int = Field(256, ge=1, description="results recorded at once")
    fold_copy: Literal["auto", "gpu", "host"] = Field(
        "auto", description="where a copy of the base weights is kept for folding"
    )

    max_body_bytes: int = Field(4 * 1024 * 1024, ge=1024, description="largest request body")
    retention_seconds: float = Field(
        30 * 86_400, ge=0, description="how long finished jobs and batches stay; 0 is for ever"
    )
    max_file_bytes: int = Field(200_000_000, ge=1, description="largest file of a batch")
    max_batch_lines: int = Field(50_000, ge=1, description="most lines of a batch")
    max_adapter_bytes: int = Field(
        4 * 1024**3, ge=1024, description="largest upload of an adapter, and its files unpacked"
    )
    adapter_cache_bytes: int = Field(
        64 * 1024**3, ge=0, description="a worker's local copies of adapters, oldest deleted first"
    )
    webhook_allow: str = Field(
        "", description="networks of your own that webhooks may reach: 10.0.0.0/8,fd00::/8"
    )
    webhook_seconds: float = Field(30, gt=0, le=120, description="longest wait for a receiver")
    public_url: str | None = Field(
        None, description="the API's address as clients know it, for links in webhooks"
    )
    keep_alive_seconds: int = Field(
        75, ge=1, description="how long the API keeps an idle connection open"
    )
    require_keys: bool = Field(True, description="whether the API asks for a bearer key")
    metrics_port: int | None = Field(
        None, ge=0, le=65_535, description="a worker's port for /metrics; 0 is any free one"
    )
    metrics_host: str = Field("127.0.0.1", description="where a worker's /metrics listens")
    log_level: str = Field("info", description="debug, info, warning or error")

    @field_validator("webhook_allow")
    @classmethod
    def _networks(cls, text: str) -> str:
        Allowed.parse(text)
        return text

    def webhook_networks(self) -> Allowed:
        """The networks of `LORRY_WEBHOOK_ALLOW`."""
        return Allowed.parse(self.webhook_allow)

    def cache_folder(self) -> Path:
        """Where local copies are kept: `LORRY_CACHE_DIR`, or the user's cache folder."""
        return self.cache_dir or platformdirs.user_cache_path("lorry")


def known_variables() -> set[str]:
    """Every environment variable that Lorry reads."""
    return {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | CLIENT_VARIABLES


def load_settings(environ: Mapping[str, str], **overrides: Any) -> Settings:
    """Read the settings.

    Args:
        environ: the process's environment.
        overrides: settings that a command-line flag gave; None means not given.

    Raises:
        UsageError: an unknown `LORRY_*` variable (the nearest known one is named) or a bad value.
    """
    refuse_unknown_variables(environ)
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = f"{PREFIX}{str(first['loc'][0]).upper()}"
        raise UsageError(f"{name}={first['input']!r}: {first['msg']}") from None


def refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    """Raise UsageError for a `LORRY_*` variable that nothing reads: it is a typing error."""
    known = known_variables()
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see docs/reference/settings.md"
            raise UsageError(f"unknown setting {name}: {hint}")
