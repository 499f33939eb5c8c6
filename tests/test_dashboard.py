"""The dashboard shows a sweep and cannot change it."""

import json
import sys
from io import BytesIO

import pytest
from test_tuning import RAW

from mupgpt.errors import ConfigError
from mupgpt.report.dashboard import read_only_app
from mupgpt.tuning.spec import parse_spec
from mupgpt.tuning.study import Sweep


@pytest.fixture
def sweep(tmp_path):
    (tmp_path / "text.txt").write_text("some words " * 2000)
    return Sweep.create(parse_spec(RAW, "tiny.toml"))


def answer(app, method, path, body=b""):
    """Status and body of one request."""
    said = []
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "wsgi.input": BytesIO(body),
               "CONTENT_LENGTH": str(len(body)), "CONTENT_TYPE": "application/json",
               "SERVER_NAME": "x", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1",
               "wsgi.url_scheme": "http", "wsgi.errors": sys.stderr, "HTTP_HOST": "x"}  # fmt: skip
    content = b"".join(app(environ, lambda status, headers, *rest: said.append(status)))
    return int(said[0].split()[0]), content


def names(app):
    status, content = answer(app, "GET", "/api/studies")
    assert status == 200
    return [study["study_name"] for study in json.loads(content)["study_summaries"]]


def test_it_shows_the_sweep_and_refuses_to_change_it(sweep):
    app = read_only_app(sweep.storage)
    assert names(app) == ["tiny"]
    for method, path in (
        ("DELETE", "/api/studies/1"),
        ("POST", "/api/studies/1/rename"),
        ("PUT", "/api/studies/1/note"),
    ):
        status, content = answer(app, method, path, b'{"study_name": "mine"}')
        assert status == 405 and b"reading only" in content
    assert names(app) == ["tiny"]


def test_without_the_extra_it_says_what_to_install(sweep, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    with pytest.raises(ConfigError, match=r"mupgpt\[dashboard\]"):
        read_only_app(sweep.storage)
