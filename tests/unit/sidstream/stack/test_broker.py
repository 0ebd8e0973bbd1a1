"""The plan of a local Kafka: its ports and its size."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from sidstream.stack.broker import LocalKafka, free_ports
from streams.errors import SidstreamError


def test_free_ports_are_distinct_and_free() -> None:
    ports = free_ports(6)
    assert len(set(ports)) == 6
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_a_port_is_kept_while_it_is_free() -> None:
    free, occupied = free_ports(2)
    assert free_ports(1, [free]) == [free]
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", occupied))
        holder.listen()
        first, second = free_ports(2, [occupied, free])
    assert first != occupied
    assert second == free


def test_data_of_one_broker_are_not_taken_for_three(tmp_path: Path) -> None:
    LocalKafka.plan(tmp_path, tmp_path / "jars", brokers=1)
    (tmp_path / "cluster.json").write_text('{"id": "AAAAAAAAAAAAAAAAAAAAAA", "brokers": 1}')
    with pytest.raises(SidstreamError, match=r"1 broker\(s\), 3 asked"):
        LocalKafka.plan(tmp_path, tmp_path / "jars", brokers=3).prepare()


def test_a_cluster_names_every_broker(tmp_path: Path) -> None:
    cluster = LocalKafka.plan(tmp_path, tmp_path / "jars", brokers=3)
    assert len(cluster.bootstrap.split(",")) == 3
    assert len(set(cluster.ports)) == 6
    restarted = LocalKafka.plan(tmp_path, tmp_path / "jars", brokers=3, keep=cluster.ports)
    assert restarted.bootstrap == cluster.bootstrap
