"""Options from a file and from the environment: which one counts, and what is no option."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from vpdeploy.cli.config import ConfigOption, check_variables, options_of
from vpdeploy.cli.main import build_app
from vpdeploy.cli.sizes import parse_size
from vpdeploy.errors import SpecError

PREFIX = "VERB"


def verb(
    path: Annotated[Path, typer.Argument()],
    config: ConfigOption = None,
    port: int = 8000,
    delay_ms: float = 2.0,
    size: Annotated[int, typer.Option(parser=parse_size)] = 1,
    watch: bool = True,
    name: Annotated[list[str] | None, typer.Option()] = None,
) -> None:
    typer.echo(json.dumps([str(path), port, delay_ms, size, watch, name]))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "options.toml"


def run(*arguments: str, **environment: str) -> list:
    app = typer.Typer()
    app.command(context_settings={"auto_envvar_prefix": PREFIX})(verb)
    result = CliRunner().invoke(app, arguments, env=environment, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.output.splitlines()[-1])


def test_without_a_file_the_defaults_count():
    assert run("zoo") == ["zoo", 8000, 2.0, 1, True, None]


def test_a_file_gives_every_kind_of_option_and_the_argument(file):
    file.write_text('path = "zoo"\nport = 1\ndelay-ms = 3\nsize = "2KiB"\nwatch = false\nname = ["a", "b"]\n')
    assert run("--config", str(file)) == ["zoo", 1, 3.0, 2048, False, ["a", "b"]]
    file.write_text('delay_ms = 0.5\nsize = "0"\nwatch = true\n')
    assert run("zoo", f"--config={file}") == ["zoo", 8000, 0.5, 0, True, None]


def test_the_command_line_comes_before_the_environment_and_that_before_the_file(file):
    file.write_text('port = 1\ndelay_ms = 1\nsize = "1KiB"\nname = ["file"]\n')
    told = run("zoo", "--port", "3", "--config", str(file), VERB_PORT="2", VERB_DELAY_MS="2", VERB_NAME="x y")
    assert told == ["zoo", 3, 2.0, 1024, True, ["x", "y"]]


def test_the_file_may_be_named_in_the_environment(file):
    file.write_text("port = 5")
    assert run("zoo", VERB_CONFIG=str(file))[1] == 5


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("prot = 1", "unknown option 'prot'; did you mean 'port'?"),
        ("config = 'x'", "unknown option 'config'"),
        ("help = true", "unknown option 'help'"),
        ("[port]\na = 1", "'port' should be text, a number"),
        ("name = [{a = 1}]", "'name' should be text, a number"),
        ("port = 2000-01-01", "'port' should be text, a number"),
        ("port = secret-word", "not valid TOML, line 1"),
    ],
)
def test_what_is_no_option_is_refused_in_one_line_that_names_the_file(file, text, complaint):
    file.write_text(text)
    with pytest.raises(SpecError) as refused:
        run("zoo", "--config", str(file))
    assert str(file) in str(refused.value)
    assert complaint in str(refused.value)
    assert "secret-word" not in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SpecError, match="cannot be read"):
        run("zoo", "--config", str(tmp_path / "none.toml"))


def serve_context() -> typer.Context:
    command = typer.main.get_command(build_app()).commands["serve"]
    return command.make_context("serve", ["zoo"], **command.context_settings)


def test_every_option_of_serve_can_be_given_in_a_file_and_in_the_environment(monkeypatch):
    context = serve_context()
    names = options_of(context)
    assert {"path", "host", "port", "token_file", "max_body_bytes", "admin"} <= set(names)
    assert len(names) == len(context.command.params) - 1  # all but --config
    assert all(parameter.allow_from_autoenv for parameter in context.command.params if parameter.name != "path")
    monkeypatch.setenv("VPDEPLOY_SERVE_MAX_IMAGES", "3")
    assert serve_context().params["max_images"] == 3


def test_strange_variables_are_noted_and_empty_ones_refused(capsys):
    context = serve_context()
    check_variables(context, {"VPDEPLOY_SERVE_PROT": "1", "VPDEPLOY_SERVE_SERVICE_HOST": "h", "VPDEPLOY_TOKEN": "t"})
    check_variables(context, {"VPDEPLOY_SERVE_PORT_8000_TCP_ADDR": "h", "VPDEPLOY_SERVE_PORT": "1"})
    assert capsys.readouterr().err == "note: VPDEPLOY_SERVE_PROT sets no option; did you mean 'port'?\n"
    with pytest.raises(SpecError, match="VPDEPLOY_SERVE_TOKEN is empty"):
        check_variables(context, {"VPDEPLOY_SERVE_TOKEN": ""})
