"""optuna-dashboard on a sweep's storage, for reading only."""

from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import make_server

from optuna.storages import BaseStorage

from mupgpt.errors import ConfigError, require

__all__ = ["read_only_app", "serve"]

HOST = "127.0.0.1"
App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def read_only_app(storage: BaseStorage) -> App:
    """The dashboard as a WSGI application that refuses every request but GET and HEAD.

    Raises ConfigError where optuna-dashboard is not installed.
    """
    try:
        from optuna_dashboard import wsgi
    except ImportError as error:
        raise ConfigError(
            "the dashboard needs optuna-dashboard: pip install 'mupgpt[dashboard]'"
        ) from error
    app = wsgi(storage)

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return app(environ, start_response)
        start_response("405 Method Not Allowed", [("Allow", "GET, HEAD")])
        return [b"this dashboard is for reading only\n"]

    return guarded


def serve(storage: BaseStorage, port: int) -> None:
    """Serve the dashboard on 127.0.0.1 until interrupted; port 0 takes a free one."""
    require(0 <= port <= 65535, "port", port, "be in 0 … 65535 (0: a free one)")
    app = read_only_app(storage)
    with make_server(HOST, port, app) as server:
        print(f"http://{HOST}:{server.server_port}/ (read-only; Ctrl-C ends it)", flush=True)
        server.serve_forever()
