"""Connection options for the two Kafka clients, from the same settings (TLS and SASL included)."""

from __future__ import annotations

import ssl
from typing import Any

from streams.errors import SidstreamError
from streams.settings import KafkaSettings


def bootstrap_servers(kafka: KafkaSettings) -> list[str]:
    """The brokers' addresses. Raises SidstreamError where the settings have none."""
    if not kafka.bootstrap:
        raise SidstreamError(
            "no Kafka address: start the local stack with `sidstream up`, or set SIDSTREAM_KAFKA__BOOTSTRAP"
        )
    return [address.strip() for address in kafka.bootstrap.split(",") if address.strip()]


def _security_options(kafka: KafkaSettings) -> dict[str, Any]:
    options: dict[str, Any] = {"security_protocol": kafka.security_protocol}
    if kafka.security_protocol.endswith("SSL"):
        options["ssl_context"] = ssl.create_default_context(cafile=kafka.ssl_cafile)
    if kafka.sasl_mechanism:
        options["sasl_mechanism"] = kafka.sasl_mechanism
        options["sasl_plain_username"] = kafka.sasl_username
        if kafka.sasl_password:
            options["sasl_plain_password"] = kafka.sasl_password.get_secret_value()
    return options


def client_options(kafka: KafkaSettings) -> dict[str, Any]:
    """Keyword arguments that kafka-python's and aiokafka's clients share."""
    return {"bootstrap_servers": bootstrap_servers(kafka), **_security_options(kafka)}
