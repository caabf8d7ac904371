"""One server on a folder, its temporary files, leases and jobs: what belongs to whom, and what is never removed."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from pe_app.common.errors import InputError
from pe_app.common.progress import Progress
from pe_monailabel import compat  # noqa: F401 - before monailabel
from pe_monailabel.server import possession as possession_module
from pe_monailabel.server.possession import Possession, holder_of
from pe_monailabel.server.temporary import TemporaryFolder
from pe_monailabel.tasks import worklist
from pe_monailabel.tasks.detection import Jobs
from pe_monailabel.tasks.worklist import Leases


@pytest.fixture
def taken(tmp_path, monkeypatch):
    """``taken()`` is a server that has taken the folder; all give it back in the end."""
    monkeypatch.setattr(possession_module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(possession_module, "STALE_SECONDS", 0.6)
    servers = []

    def take(on_loss=lambda: None):
        servers.append(Possession(tmp_path / "server.json", on_loss))
        servers[-1].take()
        return servers[-1]

    yield take
    for server in servers:
        server.give_back()


def elsewhere(path, **changes):
    """The same record as if a server on another machine had written it."""
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "id": "x", "machine": "other", "host": "h2", **changes})
    )


def test_a_second_server_is_refused_with_who_holds_the_folder_since_when(taken, tmp_path):
    taken()
    since = json.loads((tmp_path / "server.json").read_text())["since"]
    with pytest.raises(InputError, match=f"is served already, by process {os.getpid()} on .* since {since[:10]}"):
        taken()
    assert str(os.getpid()) in holder_of(tmp_path)


def test_a_server_of_another_host_that_beats_is_respected_and_one_that_does_not_is_followed(taken, tmp_path):
    first = taken()
    first._end.set()
    elsewhere(tmp_path / "server.json")
    end = threading.Event()

    def beat():
        while not end.wait(0.05):
            os.utime(tmp_path / "server.json")

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(InputError, match="on h2 since"):
        taken()
    end.set()
    thread.join()
    taken()
    assert json.loads((tmp_path / "server.json").read_text())["host"] != "h2"


def test_a_server_that_was_killed_is_followed_at_once(taken, tmp_path, monkeypatch):
    taken()._end.set()
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    record = json.loads((tmp_path / "server.json").read_text())
    (tmp_path / "server.json").write_text(json.dumps({**record, "id": "x", "pid": child.pid}))
    monkeypatch.setattr(possession_module, "STALE_SECONDS", 1000.0)
    began = time.monotonic()
    taken()
    assert time.monotonic() - began < 10


def test_a_server_whose_folder_another_one_took_ends(taken, tmp_path):
    lost = threading.Event()
    taken(lost.set)
    elsewhere(tmp_path / "server.json")
    assert lost.wait(10)


def test_only_what_this_program_marked_is_removed_from_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    folder = tmp_path / "tmp"
    gone, alive = f"{child.pid}-01234567.pe-app", f"{os.getpid()}-01234567.pe-app"
    for name in (gone, alive, f"{child.pid}", "999999-b", "mine"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text("x")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (folder / f"{child.pid}-89abcdef.pe-app").symlink_to(tmp_path / "precious")
    temporary = TemporaryFolder(folder)
    temporary.use()
    left = {path.name for path in folder.iterdir() if path != temporary._own}
    assert left == {alive, f"{child.pid}", "999999-b", "mine", f"{child.pid}-89abcdef.pe-app"}
    assert (tmp_path / "precious" / "file").is_file()
    temporary.remove()


def test_a_temporary_folder_that_is_gone_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    temporary = TemporaryFolder(tmp_path / "tmp")
    temporary.use()
    temporary._own.rmdir()
    temporary.ensure()
    with tempfile.NamedTemporaryFile() as file:
        assert str(temporary._own) in file.name
    temporary.remove()


class Clock:
    """Stands for the module ``time``: a day that can be set, and seconds that only pass."""

    def __init__(self):
        self.day, self.seconds = 1e9, 0.0

    def time(self):
        return self.day + self.seconds

    def monotonic(self):
        return self.seconds


def test_a_lease_lasts_half_an_hour_whatever_the_time_of_day_is_set_to(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(worklist, "time", clock)
    leases = Leases(tmp_path / "leases.json")
    leases.take("one", "ann")
    clock.day -= 90 * 86400
    assert leases.holder("one") == "ann"
    again = Leases(tmp_path / "leases.json")  # it reads an end that lies months ahead
    clock.seconds += 31 * 60
    assert (leases.holder("one"), again.holder("one")) == ("", "")


def test_a_release_tells_whether_it_released(tmp_path):
    leases = Leases(tmp_path / "leases.json")
    leases.take("one", "ann")
    assert not leases.release("one", "bob")
    assert leases.holder("one") == "ann"
    assert leases.release("one")


def test_a_job_knows_whose_it_is():
    jobs = Jobs()
    with jobs.job("a", "ann") as report:
        report(Progress("detect", 1, 2))
        assert jobs.owner("a") == "ann"
    assert jobs.owner("b") == ""
