"""All settings in one typed object: `sidstream.toml`, overridden by environment variables `SIDSTREAM_*`."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from agents.settings import AgentsSettings
from registry.settings import (
    CodebookSettings,
    GateSettings,
    GuardSettings,
    RegistrySettings,
    RolloutSettings,
)
from serving.settings import GatewaySettings, ServingSettings
from sidstream.stack.settings import StackSettings
from streams.errors import SidstreamError
from streams.settings import HistorySettings, KafkaSettings, RedisSettings, Section, ShoppersSettings
from trainer.settings import TrainerSettings

CONFIG_VARIABLE = "SIDSTREAM_CONFIG"
DEFAULT_FILE = Path("sidstream.toml")
# Never printed, not even when they do not fit.
_SECRETS = frozenset({"sasl_password", "url", "token"})


class CycleSettings(Section):
    """How often `sidstream cycle` looks; trainer.schedule.every_minutes says how often it trains."""

    look_s: float = Field(60.0, gt=0, description="pause after a look that found nothing to do")


class Settings(BaseSettings):
    """Every setting of the product; `SIDSTREAM_KAFKA__BOOTSTRAP` overrides `bootstrap` in `[kafka]`."""

    model_config = SettingsConfigDict(
        env_prefix="SIDSTREAM_", env_nested_delimiter="__", extra="forbid", validate_default=True
    )

    kafka: KafkaSettings = Field(default_factory=KafkaSettings)
    redis: RedisSettings = Field(default_factory=RedisSettings)
    history: HistorySettings = Field(default_factory=HistorySettings)
    agents: AgentsSettings = Field(default_factory=AgentsSettings)
    registry: RegistrySettings = Field(default_factory=RegistrySettings)
    codebook: CodebookSettings = Field(default_factory=CodebookSettings)
    gate: GateSettings = Field(default_factory=GateSettings)
    rollout: RolloutSettings = Field(default_factory=RolloutSettings)
    guards: GuardSettings = Field(default_factory=GuardSettings)
    cycle: CycleSettings = Field(default_factory=CycleSettings)
    trainer: TrainerSettings = Field(default_factory=TrainerSettings)
    serving: ServingSettings = Field(default_factory=ServingSettings)
    gateway: GatewaySettings = Field(default_factory=GatewaySettings)
    stack: StackSettings = Field(default_factory=StackSettings)
    shoppers: ShoppersSettings = Field(default_factory=ShoppersSettings)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments win over the environment, the environment over the file."""
        toml = TomlConfigSettingsSource(settings_cls, toml_file=_file())
        return init_settings, env_settings, toml


def _file() -> Path | None:
    named = os.environ.get(CONFIG_VARIABLE)
    if named:
        path = Path(named)
        if not path.is_file():
            raise SidstreamError(f"{CONFIG_VARIABLE} is {named!r}, but no file is there; correct or unset it")
        return path
    return DEFAULT_FILE if DEFAULT_FILE.is_file() else None


def read() -> Settings:
    """The settings as given. Raises SidstreamError that names the field, the value and the problem."""
    try:
        return Settings()
    except tomllib.TOMLDecodeError as error:
        raise SidstreamError(f"{_file()} is not TOML: {error}; see sidstream.example.toml") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        value_text = "(hidden)" if first["loc"][-1] in _SECRETS else repr(first.get("input"))
        raise SidstreamError(
            f"setting {field} is {value_text}: {first['msg']}; "
            f"see sidstream.example.toml ({error.error_count()} problem(s) in all)"
        ) from error


def load() -> Settings:
    """The settings, with the addresses of the running local stack where none are given."""
    from sidstream.stack.state import addresses

    settings = read()
    live = addresses(settings.stack)
    if live is None:
        return settings
    update: dict[str, object] = {}
    if "home" not in settings.trainer.model_fields_set:
        # The log read from this stack's Kafka goes when the stack goes.
        home = settings.stack.home.absolute() / "trainer"
        update["trainer"] = settings.trainer.model_copy(update={"home": home})
    if not settings.kafka.bootstrap:
        update["kafka"] = settings.kafka.model_copy(update={"bootstrap": live.kafka})
    if not settings.redis.url:
        update["redis"] = RedisSettings.model_validate({"url": live.redis})
    if not settings.registry.tracking_uri:
        update["registry"] = settings.registry.model_copy(update={"tracking_uri": live.mlflow})
    if live.gateway_port and "SIDSTREAM_GATEWAY__PORT" not in os.environ:
        update["gateway"] = settings.gateway.model_copy(
            update={"host": live.gateway_host, "port": live.gateway_port}
        )
    return settings.model_copy(update=update)
