"""Many machines on one PostgreSQL: exact budget, late joiners, dead workers, a database away."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import optuna
import pytest
import tomli_w
from sqlalchemy import event
from test_tuning import RAW, SLOW, states, wait_until

from mupgpt.errors import ConfigError
from mupgpt.tuning.storage import close_storage, open_storage, quiet
from mupgpt.tuning.study import Sweep

pytestmark = pytest.mark.slow
psycopg = pytest.importorskip("psycopg")


def binary(name):
    """A server program: on the PATH, or where Debian keeps it."""
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    found = shutil.which(name) or (str(places[-1]) if places else None)
    if found is None and os.environ.get("MUPGPT_SYSTEM_PACKAGES"):
        pytest.fail(f"no {name}: .ci/system installs PostgreSQL")
    if found is None:
        pytest.skip(f"no {name}: .ci/system installs PostgreSQL")
    return found


class Server:
    """A PostgreSQL server on loopback that can be stopped and started; never as root."""

    def __init__(self, folder):
        self.folder = folder
        self.user = "postgres" if os.geteuid() == 0 else None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        if self.user:
            owner = pwd.getpwnam(self.user)
            os.chown(folder, owner.pw_uid, owner.pw_gid)
        self._run([binary("initdb"), "-D", str(folder / "data"), "-A", "trust", "-U", "mupgpt"])
        self.start()

    @property
    def url(self):
        return f"postgresql+psycopg://mupgpt@127.0.0.1:{self.port}/postgres"

    def _run(self, command):
        subprocess.run(command, user=self.user, check=True, capture_output=True, cwd=self.folder)

    def start(self):
        self.process = subprocess.Popen(
            [binary("postgres"), "-D", str(self.folder / "data"), "-p", str(self.port),
             "-k", str(self.folder), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"],
            user=self.user, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(plain(self.url)).close()
                return
            except psycopg.OperationalError:
                assert time.monotonic() < deadline, "the server does not start"
                time.sleep(0.1)

    def stop(self):
        self.process.send_signal(signal.SIGINT)  # fast shutdown: connections are cut
        self.process.wait()

    def clear(self):
        with psycopg.connect(plain(self.url)) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")


@pytest.fixture(scope="module")
def server():
    folder = Path(tempfile.mkdtemp(prefix="mupgpt-postgres-"))
    server = Server(folder)
    yield server
    server.stop()
    shutil.rmtree(folder)


@pytest.fixture
def url(server, tmp_path):
    server.clear()
    (tmp_path / "text.txt").write_text("".join(f"line {i}: {i * i}\n" for i in range(700)))
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(SLOW))
    return server.url


@pytest.fixture
def machine(url):
    """Starts what one machine runs: joins the study and works until nothing is left."""
    command = [sys.executable, "-m", "mupgpt", "sweep", "run", "tiny.toml", "--storage", url]
    with ExitStack() as ended:

        def start():
            child = subprocess.Popen(
                [*command, "--workers", "1"], stderr=subprocess.PIPE, text=True
            )
            ended.enter_context(child)
            ended.callback(child.kill)
            return child

        yield start


def complete(url):
    """How many trials are complete, asked on a connection that is closed again."""
    with psycopg.connect(plain(url)) as connection:
        if not connection.execute("SELECT to_regclass('trials')").fetchone()[0]:
            return 0
        query = "SELECT count(*) FROM trials WHERE state = 'COMPLETE'"
        return connection.execute(query).fetchone()[0]


def plain(url):
    """The server's own form of an SQLAlchemy URL."""
    return url.replace("+psycopg", "")


def test_machines_join_leave_and_die_and_the_budget_is_exact(url, machine):
    """Two machines that find no tables, one killed in the middle, a third that joins late."""
    first, second = machine(), machine()
    wait_until(lambda: complete(url) >= 2, first)
    second.kill()
    late = machine()
    for child in (first, late):
        said = child.communicate()[1]
        assert child.returncode == 0, said
    with closing(Sweep.open("tiny", url)) as sweep:
        study = sweep.studies()["tiny"]
        trials, seen = study.trials, states(study)
    done = [t for t in trials if t.state.name == "COMPLETE"]
    assert len(done) == 24 and "WAITING" not in seen and "RUNNING" not in seen
    assert len({tuple(sorted(t.params.items())) for t in done}) == 24


def test_ten_seconds_without_the_database(url, server, machine):
    """The server goes away in the middle of training and comes back: nobody notices but the log."""
    child = machine()
    wait_until(lambda: complete(url) >= 2, child)
    server.stop()
    time.sleep(10)
    server.start()
    said = child.communicate()[1]
    assert child.returncode == 0, said
    assert complete(url) == 24


@pytest.mark.parametrize("table", ["trials", "trial_values", "trial_params"])
def test_a_connection_cut_between_two_queries_of_one_call(url, table):
    """Optuna reads trials in several queries, and if one fails, again in the same transaction."""
    storage = open_storage(url)
    study, cut = optuna.create_study(storage=storage), []
    with quiet():
        study.ask()  # one that runs is asked for anew, beside what is newer than the last to end
    study.add_trial(optuna.create_trial(value=3.0))
    assert len(study.trials) == 2

    @event.listens_for(storage.database.engine, "before_cursor_execute")
    def shut(connection, _cursor, statement, *_):
        if f"FROM {table}" in statement and not cut:
            cut.append(connection.connection.driver_connection.info.backend_pid)
            with psycopg.connect(plain(url)) as other:
                other.execute("SELECT pg_terminate_backend(%s, 10000)", cut)

    found = study.get_trials()
    close_storage(storage)
    assert [t.value for t in found] == [None, 3.0] and cut


def test_an_unreachable_server_is_one_clear_error(url, server):
    wrong = url.replace(str(server.port), "1")
    with pytest.raises(ConfigError, match="cannot open storage"):
        Sweep.open("tiny", wrong)


def command_lines(word):
    """Those of all processes that contain the word; everyone may read them."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            if word in (line := file.read_bytes()):
                yield line


def test_a_password_stands_nowhere_but_in_memory_and_environment(url, tmp_path):
    """Two workers under a parent that has the URL by environment: no command line, no log, no
    output has its password (which this server does not ask for)."""
    (tmp_path / "quick.toml").write_text(tomli_w.dumps({**RAW, "name": "quick"}))
    secret = url.replace("mupgpt@", "mupgpt:hunter2@")
    env = {**os.environ, "MUPGPT_STORAGE": secret}
    command = [sys.executable, "-m", "mupgpt", "sweep", "run", "quick.toml", "--workers", "2"]
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        worker = b"mupgpt.tuning.worker\0quick"
        wait_until(lambda: len([*command_lines(worker)]) == 2, child)
        assert not [*command_lines(b"hunter2")]
        said = child.communicate()[0]
    assert child.returncode == 0 and complete(url) == 6
    assert "mupgpt:***@" in said and "hunter2" not in said
    logs = [log.read_text() for log in Path("runs/sweeps/quick").glob("*.log")]
    assert len(logs) == 2 and "hunter2" not in "".join(logs)
