"""What verbs tell on stderr while they work."""

import io
import logging

from typer.testing import CliRunner

from vpdeploy.cli.log import tell_on_stderr
from vpdeploy.cli.main import build_app

LOGGER = logging.getLogger("vpdeploy.train")


def test_warnings_are_marked_and_news_are_bare(capsys):
    tell_on_stderr()
    LOGGER.info("%d images", 3)
    LOGGER.warning("class '%s' is small", "owl")
    captured = capsys.readouterr()
    assert captured.err == "3 images\nwarning: class 'owl' is small\n"
    assert captured.out == ""


def test_a_line_after_a_verb_whose_stderr_is_closed_goes_to_the_present_one(capsys, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", True)
    CliRunner().invoke(build_app(), ["inspect", "nothing"])
    closed = io.StringIO()
    closed.close()
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", closed)
        tell_on_stderr()
    LOGGER.info("later")
    assert capsys.readouterr().err == "later\n"
