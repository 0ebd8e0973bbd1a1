"""sidstream.example.toml holds every setting once, with its default, and is what the types render."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field, SecretStr

from sidstream.config_template import literal, render
from sidstream.settings import Settings

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "sidstream.example.toml"
SETTING = re.compile(r"^#([a-z_0-9]+) =(.*)$", re.MULTILINE)


def uncommented(text: str) -> dict[str, Any]:
    """The file with every setting switched on; one without a default becomes an empty string."""
    return tomllib.loads(SETTING.sub(lambda match: f"{match[1]} ={match[2] or ' ' + repr('')}", text))


def fields(model: type[BaseModel]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        inner = field.annotation
        is_section = isinstance(inner, type) and issubclass(inner, BaseModel)
        tree[name] = fields(inner) if is_section else None
    return tree


def keys(tree: Any) -> Any:
    return {name: keys(value) for name, value in tree.items()} if isinstance(tree, dict) else None


def test_the_file_is_what_the_types_render() -> None:
    assert EXAMPLE.read_text() == render(Settings), (
        "run `python -m sidstream.config_template > sidstream.example.toml`"
    )


def test_its_keys_are_the_settings() -> None:
    assert keys(uncommented(EXAMPLE.read_text())) == fields(Settings)


def test_its_values_are_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_values = re.sub(r"^#[a-z_0-9]+ =$", "", EXAMPLE.read_text(), flags=re.MULTILINE)
    (tmp_path / "all.toml").write_text(SETTING.sub(r"\1 =\2", with_values))
    monkeypatch.chdir(tmp_path)
    plain = Settings()
    monkeypatch.setenv("SIDSTREAM_CONFIG", str(tmp_path / "all.toml"))
    assert Settings() == plain


def test_as_it_stands_it_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = Settings()
    monkeypatch.setenv("SIDSTREAM_CONFIG", str(EXAMPLE))
    assert Settings() == plain


def undescribed(model: type[BaseModel], path: str = "") -> list[str]:
    missing = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            missing += undescribed(inner, f"{path}{name}.")
        elif not field.description:
            missing.append(f"{path}{name}")
    return missing


def test_every_setting_says_what_it_means() -> None:
    assert undescribed(Settings) == []


class Inner(BaseModel):
    """A part."""

    rate: float = Field(0.5, gt=0, le=1, description="a share")
    secret: SecretStr | None = Field(None, description="a password")


class Outer(BaseModel):
    """All."""

    mode: Literal["a", "b"] = Field("a", description="how")
    names: list[str] = Field(["x", 'y"z'], description="who")
    home: Path = Field(default_factory=Path.home, description="where")
    inner: Inner = Field(default_factory=Inner)


def test_meanings_choices_limits_and_defaults_are_shown() -> None:
    text = render(Outer)
    assert '# how; one of a, b\n#mode = "a"\n' in text
    assert "[inner]\n# A part.\n" in text
    assert "# a share; more than 0, at most 1\n#rate = 0.5\n" in text
    assert "# a password\n#secret =\n" in text
    assert uncommented(text)["names"] == ["x", 'y"z']


def test_a_default_that_depends_on_the_machine_is_not_written_down() -> None:
    text = render(Outer)
    assert str(Path.home()) not in text
    assert "#home =\n" in text


def test_a_default_secret_is_refused() -> None:
    with pytest.raises(TypeError, match="secret"):
        literal(SecretStr("hunter2"))
