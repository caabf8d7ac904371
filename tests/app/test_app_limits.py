"""What one request may take, and what stays of it: the real app behind its guard, over real sockets."""

import errno
import gzip
import json
import os
import resource
import shutil
import socket
import stat
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import uvicorn
from app_server import APP, chest
from fastapi import FastAPI
from small_studies import CLASSIFIER, ENCODER, SLABS

import pe_monailabel.server.audit
import pe_monailabel.server.limits
import pe_monailabel.server.middleware
import pe_monailabel.server.protocol
from pe_app.common.errors import InputError
from pe_app.ct.volume_io import write_volume
from pe_app.model.detector import Detector
from pe_monailabel.server.access import TokenFile
from pe_monailabel.server.audit import Audit
from pe_monailabel.server.middleware import Guard
from pe_monailabel.server.permissions import RULES
from pe_monailabel.server.protocol import PunctualProtocol

ROLES = ("reader", "annotator", "admin")


@pytest.fixture(scope="module")
def inside(tmp_path_factory):
    """The app in this process: its parts, and ``ask`` for requests to it."""
    environment = dict(os.environ)
    import pe_monailabel.compat  # noqa: F401 - before monailabel

    # isort: split
    from monailabel.config import settings
    from monailabel.interfaces.utils.app import app_instance, clear_cache

    from pe_monailabel.server import serving as server

    folder = tmp_path_factory.mktemp("limits")
    write_volume(chest(0, emboli=1)[0], folder / "studies" / "one.nrrd")
    Detector.untrained(0, SLABS, ENCODER, CLASSIFIER).save(folder / "model.safetensors")
    left = folder / "studies" / ".pe" / "tmp" / "999999999-1a2b3c4d.pe-app"
    left.mkdir(parents=True)
    settings.MONAI_LABEL_APP_DIR, settings.MONAI_LABEL_STUDIES = str(APP), str(folder / "studies")
    settings.MONAI_LABEL_APP_CONF = {"model": str(folder / "model.safetensors")}
    clear_cache()
    config = uvicorn.Config(
        server.app, port=0, log_config=None, access_log=False, proxy_headers=False, http=PunctualProtocol
    )
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started and thread.is_alive():
        time.sleep(0.05)
    port = running.servers[0].sockets[0].getsockname()[1]

    def ask(method, path, **arguments):
        return requests.request(method, f"http://127.0.0.1:{port}{path}", timeout=120, **arguments)

    yield SimpleNamespace(
        ask=ask, port=port, guard=server.app, api=server.api, server=server, app=app_instance(), left=left,
        temporary=Path(tempfile.gettempdir()), studies=folder / "studies",
    )  # fmt: skip
    running.should_exit = True
    thread.join()
    clear_cache()
    tempfile.tempdir = None
    os.environ.clear()
    os.environ.update(environment)


def endless(megabytes):
    for _ in range(megabytes):
        yield bytes(1 << 20)


# --- who may do what


def routes(api):
    return {(method, route.path) for route in api.routes for method in route.methods}


def test_every_route_has_a_role_and_no_role_is_left_over(inside):
    known = routes(inside.api)
    undecided = {f"{method} {path}" for method, path in known if method != "HEAD"} - RULES.keys()
    assert undecided == set(), "add them to lib/policy.py"
    assert RULES.keys() <= {f"{method} {path}" for method, path in known}
    assert {("HEAD", path) for method, path in known if method == "HEAD"} <= {
        ("HEAD", path) for method, path in known if method == "GET"
    }, "a HEAD follows the rule of its GET"


def test_every_route_refuses_whoever_lacks_its_role(inside, tmp_path, monkeypatch):
    tokens = TokenFile(tmp_path / "tokens.json")
    bearer = {role: {"Authorization": f"Bearer {tokens.add(role, role)}"} for role in ROLES}
    monkeypatch.setattr(inside.guard, "tokens", tokens)
    for method, path in sorted(routes(inside.api)):
        rule = RULES.get(f"{method} {path}") or RULES[f"GET {path}"]
        filled = path.replace("{", "").replace("}", "")
        if rule.role is None:
            assert inside.ask(method, filled).status_code != 403
            continue
        assert inside.ask(method, filled).status_code == 401, path
        for role in ROLES[: ROLES.index(rule.role)]:
            assert inside.ask(method, filled, headers=bearer[role]).status_code == 403, (path, role)


def test_a_route_that_nobody_decided_on_is_the_admins_alone(inside, tmp_path):
    new = FastAPI()
    new.add_api_route("/new", lambda: "done")
    new.mount("/pages", FastAPI())
    guard = Guard(new, new.routes)
    guard.tokens = TokenFile(tmp_path / "tokens.json")
    tokens = {role: guard.tokens.add(role, role) for role in ROLES}
    running = uvicorn.Server(uvicorn.Config(guard, port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.02)
    try:
        address = f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
        for path, there in (("/new", 200), ("/pages/x", 404)):
            said = [
                requests.get(
                    address + path, headers={"Authorization": f"Bearer {tokens[role]}"}, timeout=30
                ).status_code
                for role in ROLES
            ]
            assert said == [403, 403, there]
    finally:
        running.should_exit = True
        thread.join()


def test_a_proxy_on_this_machine_opens_no_door_for_others(inside, tmp_path, monkeypatch):
    forwarded = {"X-Forwarded-For": "10.1.2.3"}
    refused = inside.ask("GET", "/info/", headers=forwarded)
    assert refused.status_code == 403
    assert "--tokens" in refused.json()["detail"]
    tokens = TokenFile(tmp_path / "tokens.json")
    monkeypatch.setattr(inside.guard, "tokens", tokens)
    bearer = {"Authorization": f"Bearer {tokens.add('ann', 'reader')}"}
    assert inside.ask("GET", "/pe/studies/one", headers={**forwarded, **bearer}).ok
    line = lines(inside.studies / ".pe" / "audit.jsonl")[-1]
    assert (line["from"], line["forwarded_for"]) == ("127.0.0.1", "10.1.2.3")


def test_a_proxy_that_speaks_https_is_the_origin_of_its_own_pages(inside):
    page = {"Origin": f"https://127.0.0.1:{inside.port}"}
    assert inside.ask("GET", "/info/", headers=page).status_code == 403
    assert inside.ask("GET", "/info/", headers={**page, "X-Forwarded-Proto": "https"}).ok


def test_there_are_no_websockets(inside):
    with socket.create_connection(("127.0.0.1", inside.port)) as client:
        client.sendall(
            b"GET /info/ HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        assert b"101" not in client.recv(100).split(b"\r\n")[0]


def test_monai_labels_own_login_is_refused_with_a_sentence(inside, monkeypatch):
    monkeypatch.setattr(inside.server.settings, "MONAI_LABEL_AUTH_ENABLE", True)
    with pytest.raises(InputError, match="accepts nobody"):
        inside.server._tell_tasks()


# --- how much


@pytest.mark.parametrize("path", ["/datastore/label?image=one", "/datastore/image?image=new", "/datastore/?image=new"])
def test_an_upload_over_the_limit_is_413_whether_it_says_its_size_or_not(inside, monkeypatch, path):
    monkeypatch.setattr(inside.guard, "upload_bytes", 2 << 20)
    part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.nrrd"\r\n\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    for body in (part + bytes(3 << 20), (chunk for chunk in (part, *endless(3)))):
        answer = inside.ask("PUT", path, data=body, headers=headers)
        assert answer.status_code == 413
        assert answer.json()["detail"] == "the request is larger than 2 MiB, which is the limit here"
    assert inside.app.store.list_images() == ["one"]


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("POST", "/train/encoder", "application/json"),
        ("PUT", "/datastore/image/info?image=one", "application/x-www-form-urlencoded"),
        ("POST", "/infer/detection?image=one", "multipart/form-data; boundary=x"),
    ],
)
def test_a_request_that_brings_no_file_is_small(inside, method, path, kind):
    declared = inside.ask(method, path, data=b"".join(endless(5)), headers={"Content-Type": kind})
    assert declared.status_code == 413
    assert "4 MiB" in declared.json()["detail"]
    counted = inside.ask(method, path, data=endless(5), headers={"Content-Type": kind})
    assert counted.status_code in (400, 413), "a form ends before, at its longest field"
    assert len(counted.json()["detail"]) > 10


def test_too_many_uploads_at_once_are_told_when_to_come_again(inside, monkeypatch):
    monkeypatch.setattr(pe_monailabel.server.middleware, "UPLOADS_AT_ONCE", 0)
    answer = inside.ask("PUT", "/datastore/label?image=one", files={"label": ("a.nrrd", b"")})
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) > 0


def test_one_reader_takes_not_all_places_for_uploads(inside, tmp_path, monkeypatch):
    tokens = TokenFile(tmp_path / "tokens.json")
    ann, bob = ({"Authorization": f"Bearer {tokens.add(name, 'annotator')}"} for name in ("ann", "bob"))
    monkeypatch.setattr(inside.guard, "tokens", tokens)
    monkeypatch.setitem(inside.guard._uploads, "ann", pe_monailabel.server.middleware.UPLOADS_OF_ONE)
    sent = {"files": {"label": ("a.nrrd", b"")}}
    refused = inside.ask("PUT", "/datastore/label?image=one", headers=ann, **sent)
    assert refused.status_code == 429
    assert "from ann" in refused.json()["detail"]
    assert inside.ask("PUT", "/datastore/label?image=one", headers=bob, **sent).status_code == 422


def test_a_form_of_many_small_files_takes_the_memory_of_one(inside, monkeypatch):
    import starlette.formparsers

    made, spooled = [], starlette.formparsers.SpooledTemporaryFile

    def counted(*arguments, **options):
        made.append(options.get("max_size"))
        return spooled(*arguments, **options)

    monkeypatch.setattr(starlette.formparsers, "SpooledTemporaryFile", counted)
    files = [("label", (f"{number}.nrrd", b"x")) for number in range(900)]
    answer = inside.ask("PUT", "/datastore/label?image=one", files=files)
    assert answer.status_code == 400
    assert "Maximum number of files is 1" in answer.json()["detail"]
    assert made == [1 << 20]
    fields = {f"field{number}": "x" for number in range(100)}
    answer = inside.ask("PUT", "/datastore/label?image=one", data=fields, files={"label": ("a.nrrd", b"x")})
    assert answer.status_code == 400
    assert "fields" in answer.json()["detail"]


def unfinished(inside, request):
    """What the server answers to a request that never ends, and that it closes the connection after it."""
    with socket.create_connection(("127.0.0.1", inside.port), timeout=30) as client:
        client.sendall(request)
        answer = b""
        while block := client.recv(1 << 16):
            answer += block
        return answer


def test_a_body_that_stalls_is_given_up(inside, monkeypatch):
    monkeypatch.setattr(pe_monailabel.server.limits, "STALL_SECONDS", 0.3)
    head = "PUT /datastore/label?image=one HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: 5000\r\n"
    kind = "Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    answer = unfinished(inside, (head + kind).encode())
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"came too slowly" in answer
    assert inside.guard._uploads.total() == 0


def test_a_body_that_drips_is_given_up(inside, monkeypatch):
    monkeypatch.setattr(pe_monailabel.server.limits, "STALL_SECONDS", 0.3)
    head = "PUT /datastore/label?image=one HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: 5000\r\n"
    kind = "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
    kind += '--x\r\nContent-Disposition: form-data; name="label"; filename="a.nrrd"\r\n\r\n'
    with socket.create_connection(("127.0.0.1", inside.port)) as client:
        client.sendall((head + kind).encode())
        client.settimeout(0.05)
        answer = b""
        for _ in range(200):
            with suppress(TimeoutError):
                answer = client.recv(1 << 16)
                break
            client.sendall(b"x")
    assert answer.startswith(b"HTTP/1.1 408")


def test_headers_that_do_not_end_are_given_up(inside, monkeypatch):
    monkeypatch.setattr(pe_monailabel.server.protocol, "HEADER_SECONDS", 0.3)
    assert unfinished(inside, b"GET /info/ HTTP/1.1\r\nHost: 127.0.0.1\r\n") == b""


def test_a_detection_that_is_kept_waits_for_no_other(inside):
    asked = "/infer/detection?image=one&output=json"
    first = inside.ask("POST", asked)
    assert first.ok, first.text
    with inside.app.detections._turn:  # another one runs
        again = requests.post(f"http://127.0.0.1:{inside.port}{asked}", timeout=20)
    assert again.json() == first.json()
    shutil.rmtree(inside.studies / ".pe" / "detections")


def test_a_folder_that_may_not_be_written_is_reported_in_a_sentence(inside, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "datastore_v2.json")

    monkeypatch.setattr(inside.app.store, "update_image_info", refuse)
    answer = inside.ask("PUT", "/datastore/image/info?image=one", data={"info": '{"pe_label": "negative"}'})
    assert answer.status_code == 500
    assert "may not write" in answer.json()["detail"]


# --- the front page


def test_the_address_opens_the_worklist_in_a_browser_and_tells_programs_what_is_served(inside):
    assert inside.ask("GET", "/").json()["openapi"] == "/openapi.json"
    page = inside.ask("GET", "/", headers={"Accept": "text/html,application/xhtml+xml"})
    assert page.headers["Content-Type"].startswith("text/html")
    assert "<td>one" in page.text
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "script" not in page.text


def test_without_a_token_the_front_page_shows_nothing_of_the_studies(inside, tmp_path, monkeypatch):
    tokens = TokenFile(tmp_path / "tokens.json")
    tokens.add("ann", "reader")
    monkeypatch.setattr(inside.guard, "tokens", tokens)
    page = inside.ask("GET", "/", headers={"Accept": "text/html"})
    assert page.ok
    assert "pe-app tokens add" in page.text
    assert "<td>one" not in page.text
    assert inside.ask("GET", "/").json()["tokens"] is True


def test_others_go_on_while_a_ct_that_was_added_is_written(inside, monkeypatch):
    import pe_monailabel.store.studies

    write, answers = pe_monailabel.store.studies.write_volume, []

    def slowly(volume, path):
        (inside.studies / "being-copied.part").touch()  # the folder changed: it is listed anew
        answers.extend(inside.ask("GET", page).status_code for page in ("/info/", "/pe/worklist"))
        write(volume, path)

    monkeypatch.setattr(pe_monailabel.store.studies, "write_volume", slowly)
    content = (inside.studies / "one.nrrd").read_bytes()
    assert inside.ask("PUT", "/datastore/image?image=slow", files={"file": ("a.nrrd", content)}).ok
    assert answers == [200, 200]


def bomb(kind, promised, unpacked_megabytes):
    """A file of some kilobytes whose header promises ``promised`` voxels a side and whose gzip unpacks to gigabytes."""
    zeros = gzip.compress(bytes(16 << 20)) * (unpacked_megabytes // 16)
    if kind == ".nii.gz":
        import nibabel
        import numpy as np

        header = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4)).header
        header["dim"][1:4], header["vox_offset"] = promised, 352
        return gzip.compress(header.binaryblock + bytes(4)) + zeros
    return (
        "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\n"
        f"sizes: {promised} {promised} {promised}\nspace directions: (1,0,0) (0,1,0) (0,0,1)\n"
        "kinds: domain domain domain\nendian: little\nencoding: gzip\nspace origin: (0,0,0)\n\n"
    ).encode() + zeros


@pytest.mark.parametrize("kind", [".nrrd", ".seg.nrrd", ".nii.gz"])
@pytest.mark.parametrize("promised", [1024, 30_000])
def test_a_small_file_that_promises_gigabytes_is_refused_before_it_is_unpacked(inside, kind, promised):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    content = bomb(kind, promised, 1024)
    assert len(content) < 3 << 20
    for path, name in (("/datastore/label?image=one", "label"), ("/datastore/image?image=new", "file")):
        if name == "file" and kind == ".seg.nrrd":
            continue
        answer = inside.ask("PUT", path, files={name: (f"a{kind}", content)})
        assert answer.status_code == 413, answer.text
        assert len(answer.json()["detail"]) > 20
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100 << 10, f"{grown / 1024:.0f} MiB"


def test_what_a_file_holds_beyond_its_header_is_not_unpacked(inside):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer = inside.ask("PUT", "/datastore/label?image=one", files={"label": ("a.nii.gz", bomb(".nii.gz", 20, 1024))})
    assert answer.status_code == 422
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def test_a_detection_that_takes_too_long_is_stopped_and_the_next_one_runs(inside, monkeypatch):
    monkeypatch.setattr(inside.app.jobs, "seconds", 1e-9)
    late = inside.ask("POST", "/infer/detection?image=one", data={"params": '{"job": "late"}'})
    assert late.status_code == 504
    assert "took longer than" in late.json()["detail"]
    assert inside.ask("GET", "/pe/jobs/late").json()["state"] == "failed"
    monkeypatch.undo()
    assert inside.ask("POST", "/infer/detection?image=one").ok


def test_more_waiting_detections_than_there_is_room_for_are_told_when_to_come_again(inside, monkeypatch):
    monkeypatch.setattr("pe_monailabel.tasks.detection.WAITING_DETECTIONS", -1)
    answer = inside.ask("POST", "/infer/detection?image=one")
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) > 0


# --- what stays


def test_no_upload_leaves_a_temporary_file_whether_it_succeeds_or_not(inside, monkeypatch):
    assert inside.temporary.parent == inside.studies / ".pe" / "tmp"
    _, mask = chest(0, emboli=1)
    write_volume(mask, inside.studies.parent / "mask.nrrd")
    good = (inside.studies.parent / "mask.nrrd").read_bytes()
    ct = (inside.studies / "one.nrrd").read_bytes()
    label, image = "/datastore/label?image=one&tag=mine", "/datastore/image?image=two"
    for path, files, status in (
        (label, {"label": ("a.nrrd", good)}, 200),
        (label, {"label": ("a.nrrd", good[:-50])}, 422),
        (label, {"label": ("a.nrrd", bytes(3 << 20))}, 422),
        (label, {"label": ("a.exe", good)}, 422),
        (label, {"other": ("a.nrrd", bytes(3 << 20))}, 422),
        (label.replace("one", "nobody"), {"label": ("a.nrrd", good)}, 404),
        (image, {"file": ("a.nrrd", ct)}, 200),
        (image, {"file": ("a.nrrd", ct)}, 409),
        (image, {"file": ("a.nrrd", ct[:-50])}, 422),
        ("/datastore/?image=a/b", {"file": ("a.nrrd", ct)}, 422),
    ):
        answer = inside.ask("PUT", path, files=files)
        assert answer.status_code == status, (path, answer.text)
        assert list(inside.temporary.iterdir()) == [], path
    for model in ("detection", "candidates"):
        assert inside.ask("POST", f"/infer/{model}?image=one").ok
        assert list(inside.temporary.iterdir()) == []


def test_what_a_killed_server_left_is_gone(inside):
    assert not inside.left.exists()


def test_a_client_that_goes_away_in_mid_upload_leaves_nothing(inside):
    def held():
        """Temporary files that this process has open; those of an upload have no name."""
        links = (os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())
        return [link for link in links if str(inside.temporary) in link]

    with socket.create_connection(("127.0.0.1", inside.port)) as client:
        head = b'--x\r\nContent-Disposition: form-data; name="label"; filename="a.nrrd"\r\n\r\n'
        client.sendall(
            b"PUT /datastore/label?image=one HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n" + head + bytes(4 << 20)
        )
        eventually(held)
    eventually(lambda: not held())
    assert list(inside.temporary.iterdir()) == []


def eventually(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_disk_that_fills_during_an_upload_is_told_as_that(inside, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "write", full)
    answer = inside.ask("PUT", "/datastore/label?image=one", files={"label": ("a.nrrd", bytes(1000))})
    assert answer.status_code == 507
    assert "disk is full" in answer.json()["detail"]


# --- the audit log


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def log(audit, count, **more):
    import anyio

    async def write():
        for number in range(count):
            await audit.write({"number": number}, **more)

    anyio.run(write)


def test_a_full_disk_stops_no_request_and_the_log_says_how_many_lines_are_missing(inside, monkeypatch):
    path = inside.studies / ".pe" / "audit.jsonl"
    monkeypatch.setattr(inside.guard.audit, "_path", Path("/dev/full"))
    for _ in range(3):
        assert inside.ask("GET", "/pe/studies/one").ok
    monkeypatch.undo()
    inside.ask("GET", "/pe/studies/one")
    inside.ask("GET", "/pe/studies/one")
    assert [line.get("lines_missing") for line in lines(path)[-2:]] == [3, None]


def test_a_full_file_is_set_aside_and_the_oldest_go(tmp_path, monkeypatch):
    monkeypatch.setattr(pe_monailabel.server.audit, "KEPT_FILES", 3)
    log(Audit(tmp_path / "audit.jsonl", file_bytes=300), 60)
    files = sorted(tmp_path.glob("audit-*.jsonl"))
    assert len(files) == 3
    assert all(file.stat().st_size < 400 for file in files)
    numbers = [line["number"] for file in [*files, tmp_path / "audit.jsonl"] if file.exists() for line in lines(file)]
    assert numbers == list(range(60))[-len(numbers) :]
    assert stat.S_IMODE(files[0].stat().st_mode) == 0o600


def test_a_line_that_a_crash_tore_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "audit.jsonl"
    path.write_text('{"number": 1}\n{"numb')
    log(Audit(path), 1)
    assert json.loads(path.read_text().splitlines()[-1])["number"] == 0


def test_whoever_knocks_without_a_token_does_not_push_the_others_lines_out(tmp_path, monkeypatch):
    monkeypatch.setattr(pe_monailabel.server.audit, "time", SimpleNamespace(monotonic=lambda: 5.0))
    audit = Audit(tmp_path / "audit.jsonl")
    log(audit, 1000, refused=True)
    log(audit, 1)
    found = lines(tmp_path / "audit.jsonl")
    assert len(found) == pe_monailabel.server.audit.REFUSALS_A_MINUTE + 1
    assert found[-1]["lines_missing"] == 1000 - pe_monailabel.server.audit.REFUSALS_A_MINUTE
