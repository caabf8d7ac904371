"""Who may use the server: tokens, roles and hosts, against the server that ``pe-app serve`` starts with https."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
import slicer_paths  # noqa: F401
from app_server import ROOT, chest, free_port
from PulmonaryEmbolismLib.client import Client
from PulmonaryEmbolismLib.transport import ServerError
from small_studies import CLASSIFIER, ENCODER, SLABS
from typer.testing import CliRunner

from pe_app.annotation.sparse import SparseAnnotation
from pe_app.cli import app as pe_app_command
from pe_app.common.errors import InputError
from pe_app.ct.volume_io import write_volume
from pe_app.model.detector import Detector
from pe_monailabel.server.access import Caller, Role, TokenFile
from pe_monailabel.server.listen import Door

ROLES = {"rita": "reader", "ann": "annotator", "ada": "admin", "bob": "annotator"}


def pe_app(*arguments):
    """What the command answers: its standard output and how it ended."""
    return CliRunner().invoke(pe_app_command, list(map(str, arguments)))


# --- the token file


@pytest.fixture
def file(tmp_path):
    return TokenFile(tmp_path / "somewhere" / "tokens.json")


def test_a_token_is_printed_once_and_only_its_hash_is_kept_where_nobody_else_may_look(tmp_path):
    path = tmp_path / "tokens.json"
    added = pe_app("tokens", "add", "José", "--role", "annotator", "--file", path)
    token = added.stdout.strip()
    assert len(token) >= 43, "32 bytes take 43 characters of base64"
    assert token not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert TokenFile(path).find(token) == Caller("José", Role.ANNOTATOR)
    listed = pe_app("tokens", "list", "--file", path)
    assert "José" in listed.stdout
    assert token not in listed.output


def test_no_two_tokens_are_alike_and_none_is_found_by_another(file):
    tokens = {name: file.add(name, role) for name, role in ROLES.items()}
    assert len(set(tokens.values())) == len(tokens)
    for name, token in tokens.items():
        assert file.find(token) == Caller(name, Role(ROLES[name]))
    for wrong in ("", token[:-1], token + "x", token.swapcase(), "é" * 43):
        assert file.find(wrong) is None


def test_a_change_by_another_process_counts_at_once(file):
    other = TokenFile(file.path)
    token = other.add("ann", "annotator")
    assert file.find(token).name == "ann"
    other.revoke("ann")
    assert file.find(token) is None
    assert file.find(other.add("ann", "reader")).role is Role.READER


def test_two_who_add_at_once_lose_no_token(file):
    def add(name):
        for k in range(5):
            TokenFile(file.path).add(f"{name}{k}", "reader")

    threads = [threading.Thread(target=add, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {entry.name for entry in file.tokens()} == {f"{name}{k}" for name in "ab" for k in range(5)}


@pytest.mark.parametrize("damage", ["", "[]", '{"schema": "pe-tokens/1"}', '{"schema": "other", "tokens": []}', None])
def test_a_damaged_or_missing_token_file_admits_nobody(file, damage):
    token = file.add("ann", "admin")
    if damage is None:
        file.path.unlink()
    else:
        file.path.write_text(damage)
    assert file.find(token) is None
    with pytest.raises(InputError, match="pe-app tokens add"):
        TokenFile(file.path).tokens()


def test_a_token_file_that_others_may_write_admits_nobody(file):
    token = file.add("ann", "admin")
    file.path.chmod(0o620)
    assert file.find(token) is None
    file.path.chmod(0o640)
    assert file.find(token).name == "ann"


@pytest.mark.parametrize("name", ["", " ann", "a|b", 'a"b', "a\nb", "x" * 65])
def test_a_name_that_no_annotation_could_bear_is_refused(file, name):
    with pytest.raises(InputError, match="cannot name a reader"):
        file.add(name, "reader")


def test_a_name_has_one_token_and_a_role_is_one_of_three(file):
    file.add("ann", "reader")
    with pytest.raises(InputError, match="revoke it first"):
        file.add("ann", "admin")
    with pytest.raises(InputError, match="reader, annotator, admin"):
        file.add("eve", "root")
    with pytest.raises(InputError, match="nobody named eve"):
        file.revoke("eve")


# --- before the server starts


@pytest.fixture
def door(tmp_path, file, certificate):
    file.add("ann", "reader")
    empty = TokenFile(tmp_path / "empty.json")
    empty.add("x", "reader")
    empty.revoke("x")
    (tmp_path / "no_key.pem").write_text("no key")
    known = {"tokens": file.path, "empty": empty.path, "nowhere": tmp_path / "nowhere.json"}
    known |= {"certificate": certificate[0], "key": certificate[1], "no_key": tmp_path / "no_key.pem"}
    return lambda **given: Door(**{name: known.get(value, value) for name, value in given.items()})


@pytest.mark.parametrize(
    ("host", "given", "words"),
    [
        ("0.0.0.0", {}, "pe-app tokens add NAME --role ROLE"),
        ("10.1.2.3", {"tokens": "nowhere"}, "pe-app tokens add"),
        ("::", {"tokens": "empty"}, "is empty"),
        ("0.0.0.0", {"tokens": "tokens"}, "--certificate"),
        ("pe.hospital.example", {"tokens": "tokens"}, "--plain-http"),
        ("127.0.0.1", {"certificate": "certificate"}, "go together"),
        ("127.0.0.1", {"certificate": "certificate", "key": "no_key"}, "cannot be used"),
    ],
)
def test_an_unsafe_door_is_refused_with_the_way_out(door, host, given, words):
    with pytest.raises(InputError) as refused:
        door(**given).check(host)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("host", "given"),
    [
        ("127.0.0.1", {}),
        ("::1", {}),
        ("localhost", {"tokens": "tokens"}),
        ("0.0.0.0", {"tokens": "tokens", "plain_http": True}),
        ("0.0.0.0", {"tokens": "tokens", "certificate": "certificate", "key": "key"}),
    ],
)
def test_a_safe_door_is_let_stand(door, host, given):
    door(**given).check(host)


def test_serve_tells_an_unsafe_door_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["pe_monailabel.cli.serve"], "DEFAULT_FILE", tmp_path / "tokens.json")
    done = pe_app("serve", tmp_path, "--host", "0.0.0.0")
    assert isinstance(done.exception, InputError)
    assert "pe-app tokens add" in str(done.exception)


# --- the server


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    names = "subjectAltName=IP:127.0.0.1,DNS:localhost"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-addext", names,
         "-days", "2", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"], capture_output=True, check=True,
    )  # fmt: skip
    return folder / "cert.pem", folder / "key.pem"


class Served:
    """``pe-app serve`` on every address of the machine, with https and a token for each of ``ROLES``."""

    def __init__(self, folder, certificate):
        self.studies = folder / "studies"
        for seed, name in enumerate(("one", "two")):
            write_volume(chest(seed, emboli=1)[0], self.studies / f"{name}.nrrd")
        Detector.untrained(0, SLABS, ENCODER, CLASSIFIER).save(folder / "model.safetensors")
        self.tokens = TokenFile(folder / "tokens.json")
        self.token = {name: self.tokens.add(name, role) for name, role in ROLES.items()}
        self.certificate, key = certificate
        self.log = folder / "server.log"
        port = free_port()
        self.address = f"https://127.0.0.1:{port}"
        command = [
            *(sys.executable, "-m", "pe_app", "serve", str(self.studies), "--model", str(folder / "model.safetensors")),
            *("--host", "0.0.0.0", "--port", str(port), "--tokens", str(self.tokens.path), "--max-upload-mb", "64"),
            *("--certificate", str(self.certificate), "--key", str(key), "--allow-host", "PE.hospital.example"),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        for _ in range(1000):
            if self.process.poll() is not None:
                break
            try:
                self.ask("GET", "/info/")
                return
            except requests.ConnectionError:
                time.sleep(0.2)
        raise RuntimeError(self.log.read_text()[-3000:])

    def ask(self, method, path, who=None, **arguments):
        headers = {**({"Authorization": f"Bearer {self.token[who]}"} if who else {}), **arguments.pop("headers", {})}
        return requests.request(
            method, self.address + path, headers=headers, verify=self.certificate, timeout=60, **arguments
        )

    def save(self, who, study, slices, **params):
        """A review of some slices of a study, with names in it that the client makes up."""
        volume, mask = chest(["one", "two"].index(study), emboli=1)
        annotation = SparseAnnotation.from_mask(volume, mask, slices, "mallory", "2026-11-02T08:00:00Z").to_json()
        folder = self.studies.parent / "outlines"
        SparseAnnotation.from_mask(volume, mask, slices).write(folder / "a.json", volume)
        return self.ask(
            "PUT",
            f"/datastore/label?image={study}",
            who,
            data={"params": json.dumps({"annotation": annotation, "reader": "mallory", **params})},
            files={"label": ("a.seg.nrrd", (folder / "a.seg.nrrd").read_bytes())},
        )

    def audit(self):
        return [json.loads(line) for line in (self.studies / ".pe" / "audit.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def served(tmp_path_factory, certificate):
    server = Served(tmp_path_factory.mktemp("served"), certificate)
    yield server
    server.process.terminate()
    try:
        server.process.wait(30)
    finally:
        server.process.kill()


def test_without_a_token_the_server_says_how_to_get_one(served):
    answer = served.ask("GET", "/pe/worklist")
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == 'Bearer realm="pe-app"'
    assert "pe-app tokens add" in answer.json()["detail"]
    for header in ("Bearer", "Bearer ", "Bearer wrong", f"Basic {served.token['ann']}", f"{served.token['ann']}"):
        wrong = served.ask("GET", "/pe/worklist", headers={"Authorization": header})
        assert wrong.status_code == 401, header
        assert wrong.headers["WWW-Authenticate"].startswith("Bearer")
    assert served.ask("GET", f"/pe/worklist?token={served.token['ann']}").status_code == 401
    assert served.ask("GET", "/info/", "rita").json()["pe"]["reader"] == "rita"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/docs"),
        ("GET", "/redoc"),
        ("GET", "/openapi.json"),
        ("HEAD", "/openapi.json"),
        ("OPTIONS", "/datastore/label"),
        ("TRACE", "/info/"),
        ("POST", "/reload"),
        ("GET", "/static/x"),
        ("GET", "/ohif/"),
        ("GET", "/logs/"),
        ("GET", "/info"),
        ("GET", "//info/"),
        ("GET", "/INFO/"),
        ("GET", "/%69nfo/"),
        ("GET", "/no/such/path"),
    ],
)
def test_nothing_answers_without_a_token_whatever_the_path_and_method(served, method, path):
    assert served.ask(method, path).status_code == 401
    assert served.ask(method, path, "ada").status_code in (200, 404, 405, 307)


def test_a_reader_looks_and_detects_and_saves_nothing(served):
    assert served.ask("GET", "/pe/studies/one", "rita").ok
    assert served.ask("GET", "/datastore/image?image=one", "rita").content == (served.studies / "one.nrrd").read_bytes()
    assert served.ask("POST", "/infer/detection?image=one&output=json", "rita").json()["schema"].startswith("pe-det")
    before = served.ask("GET", "/pe/worklist", "rita").json()
    saving = served.save("rita", "one", [20])
    assert saving.status_code == 403
    assert saving.json()["detail"] == "rita has the role reader, and this asks for the role annotator"
    asked = {"save_label": True, "label_tag": "mine"}
    kept = served.ask("POST", "/infer/candidates?image=one", "rita", data={"params": json.dumps(asked)})
    assert kept.status_code == 403
    for method, path in (
        ("PUT", "/datastore/image/info?image=one"),
        ("POST", "/activelearning/random"),
        ("POST", "/pe/studies/one/lease"),
    ):
        assert served.ask(method, path, "rita").status_code == 403
    assert served.ask("GET", "/pe/worklist", "rita").json() == before


def test_an_annotator_trains_nothing_and_removes_nothing(served):
    for method, path in (
        ("POST", "/train/encoder"),
        ("DELETE", "/train/"),
        ("DELETE", "/datastore/label?id=one&tag=final"),
    ):
        refused = served.ask(method, path, "ann")
        assert refused.status_code == 403, path
        assert "role admin" in refused.json()["detail"]
    assert served.ask("POST", "/train/nothing", "ada").status_code == 404
    assert served.ask("GET", "/pe/training", "rita").json()["running"] is False


def test_a_label_is_recorded_under_the_name_that_the_token_proves(served):
    first = served.save("ann", "two", [20, 22])
    assert first.ok, first.text
    info = served.ask("GET", f"/datastore/label/info?label=two&tag={first.json()['tag']}", "rita").json()
    assert info["reader"] == "ann"
    assert {entry["reader"] for entry in info["annotation"]["slices"]} == {"ann"}


def test_a_reader_who_goes_on_with_a_colleagues_study_keeps_the_colleagues_name_on_its_slices(served):
    served.save("ann", "two", [20, 22])
    held = served.ask("GET", "/pe/studies/two", "bob").json()["annotation"]
    volume, mask = chest(1, emboli=1)
    more = SparseAnnotation.from_mask(volume, mask, [20, 22, 24], "mallory", "2026-11-02T09:00:00Z")
    folder = served.studies.parent / "outlines"
    more.write(folder / "b.json", volume)
    sent = more.to_json()
    sent["slices"] = [*held["slices"], sent["slices"][-1]]
    saved = served.ask(
        "PUT",
        "/datastore/label?image=two",
        "bob",
        data={"params": json.dumps({"annotation": sent, "reader": "ann"})},
        files={"label": ("b.nii.gz", nifti(served, mask, [20, 22, 24]))},
    )
    assert saved.ok, saved.text
    slices = served.ask("GET", "/pe/studies/two", "bob").json()["annotation"]["slices"]
    assert [(entry["slice_index"], entry["reader"]) for entry in slices] == [(20, "ann"), (22, "ann"), (24, "bob")]


def nifti(served, mask, slices):
    """The outlines of some slices as a plain label map."""
    kept = np.zeros_like(mask.voxels)
    kept[slices] = mask.voxels[slices]
    write_volume(mask.with_voxels(kept), served.studies.parent / "mask.nii.gz")
    return (served.studies.parent / "mask.nii.gz").read_bytes()


def test_a_lease_belongs_to_the_one_who_proved_the_name(served):
    taken = served.ask("POST", "/pe/studies/one/lease", "ann", json={"reader": "bob"})
    assert taken.json()["reader"] == "ann"
    assert served.ask("POST", "/pe/studies/one/lease", "bob", json={"reader": "ann"}).status_code == 409
    served.ask("DELETE", "/pe/studies/one/lease", "bob", json={"reader": "ann"})
    rows = served.ask("GET", "/pe/worklist", "rita").json()["studies"]
    assert {row["study"]: row["held_by"] for row in rows}["one"] == "ann"
    got = served.ask("POST", "/activelearning/next_unreviewed", "bob", json={"reader": "ann", "client_id": "ann"})
    assert got.json().get("id") != "one"
    served.ask("DELETE", "/pe/studies/one/lease", "ann")


def test_a_revoked_token_counts_no_longer_while_the_server_runs(served):
    token = served.tokens.add("eve", "reader")
    headers = {"Authorization": f"Bearer {token}"}
    assert served.ask("GET", "/pe/worklist", headers=headers).ok
    assert pe_app("tokens", "revoke", "eve", "--file", served.tokens.path).exit_code == 0
    assert served.ask("GET", "/pe/worklist", headers=headers).status_code == 401


def test_only_known_names_and_addresses_reach_the_server_and_no_foreign_page(served):
    port = served.address.rpartition(":")[2]
    for host, status in (
        (f"127.0.0.1:{port}", 200),
        (f"pe.hospital.example:{port}", 200),
        ("10.1.2.3", 200),
        ("[fe80::1]:8000", 200),
        (f"rebound.evil.example:{port}", 403),
        ("pe.hospital.example.evil.example", 403),
        ("", 403),
    ):
        answer = served.ask("GET", "/info/", "ada", headers={"Host": host})
        assert answer.status_code == status, host
    assert "--allow-host" in answer.json()["detail"]
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": f"http://127.0.0.1:{port}"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        assert served.ask("GET", "/info/", "ada", headers=headers).status_code == 403
    own = served.ask("GET", "/info/", "ada", headers={"Origin": served.address})
    assert own.ok
    assert not any(name.lower().startswith("access-control") for name in own.headers)


def test_every_answer_forbids_what_a_browser_could_make_of_it(served):
    for who, path in (("ada", "/info/"), (None, "/info/"), ("ada", "/nothing"), ("ada", "/pe/studies/nobody")):
        headers = served.ask("GET", path, who).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["Cache-Control"] == "no-store"
        assert "Server" not in headers


def test_the_slicer_client_works_with_token_and_certificate_and_says_what_is_wrong_without(served, monkeypatch):
    def sentence(token, call):
        with pytest.raises(ServerError) as caught:
            call(Client(served.address, token, reader="mallory"))
        return str(caught.value)

    assert "REQUESTS_CA_BUNDLE" in sentence("x", Client.connect)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(served.certificate))
    assert "asks for a token" in sentence("", Client.connect)
    assert "does not accept this token" in sentence("wrong", Client.connect)
    assert "role annotator" in sentence(
        served.token["rita"], lambda client: client.put_study_label("one", "negative", None)
    )
    client = Client(served.address, served.token["ann"], reader="mallory")
    assert client.connect().model.name
    assert client.reader == "ann", "what others see beside the study is what this reader sees"
    client.lease("one")
    assert [row.held_by for row in client.worklist() if row.study == "one"] == ["ann"]
    client.release("one")


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="MONAI Label's own client needs cgi of Python < 3.13")
def test_the_stock_client_logs_in_with_name_and_token(served, tmp_path):
    from monailabel.client import MONAILabelClient

    client = MONAILabelClient(served.address, tmpdir=str(tmp_path))
    assert client.auth_enabled()
    assert not client.auth_valid_token()
    with pytest.raises(Exception, match="do not belong together"):
        client.auth_token("ann", served.token["bob"])
    client.update_auth(client.auth_token("ann", served.token["ann"]))
    assert client.auth_valid_token()
    assert client.next_sample("random", {})["id"] in ("one", "two")
    assert client.infer("detection", "one", {})[1]["schema"].startswith("pe-detection")


# --- what is written down


def test_the_audit_log_says_who_did_what_to_which_study_and_no_secret(served):
    served.ask("GET", "/datastore/image?image=one&note=SECRET", "rita")
    served.save("ann", "two", [20], note="SECRET")
    served.ask("POST", "/train/nothing", "ada", json={"note": "SECRET"})
    served.ask("GET", "/pe/worklist?x=SECRET")
    served.save("rita", "one", [20])
    served.ask("GET", "/info/", "ada")
    *_, read, wrote, trained, unknown, refused = served.audit()
    common = {"from": "127.0.0.1"}
    time_of_read = read.pop("time")
    assert time.strftime("%Y-%m-%dT") == time_of_read[:11]
    assert read == {
        **common, "who": "rita", "did": "read", "request": "GET /datastore/image", "study": "one", "status": 200,
    }  # fmt: skip
    assert (wrote["who"], wrote["did"], wrote["study"], wrote["status"]) == ("ann", "wrote", "two", 200)
    assert (trained["who"], trained["did"], trained["model"], trained["status"]) == ("ada", "trained", "nothing", 404)
    assert (unknown["who"], unknown["did"], unknown["status"]) == (None, "refused", 401)
    assert (refused["who"], refused["did"], refused["study"], refused["status"]) == ("rita", "refused", "one", 403)
    path = served.studies / ".pe" / "audit.jsonl"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    everything = path.read_text() + served.log.read_text()
    assert "SECRET" not in path.read_text()
    assert not any(token in everything for token in served.token.values())


def test_the_study_that_the_server_chose_is_in_the_audit_log(served):
    chosen = served.ask("POST", "/activelearning/random", "bob").json()["id"]
    assert served.audit()[-1]["study"] == chosen
    served.ask("DELETE", f"/pe/studies/{chosen}/lease", "bob")


# --- while it works, and when it ends


def test_an_upload_stops_nobody_else_and_stays_out_of_the_memory(served):
    status = Path(f"/proc/{served.process.pid}/status")

    def peak():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))

    def body():
        yield b'--x\r\nContent-Disposition: form-data; name="label"; filename="a.nrrd"\r\n\r\n'
        for number in range(60):
            if number % 20 == 10:
                assert served.ask("GET", "/info/", "rita").ok, "the upload is under way"
            yield bytes(1 << 20)
        yield b"\r\n--x--\r\n"

    (status.parent / "clear_refs").write_text("5")  # the peak begins anew
    before = peak()
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = served.ask("PUT", "/datastore/label?image=one&tag=mine", "ann", data=body(), headers=headers)
    assert answer.status_code == 422, answer.text
    assert peak() - before < 32 << 10


def test_a_server_that_is_told_to_end_takes_its_training_with_it_and_keeps_what_was_saved(served):
    saved = served.save("ann", "two", [20, 22, 24]).json()
    assert served.ask("POST", "/train/encoder", "ada", json={"epochs": 1}).ok
    server = psutil.Process(served.process.pid)
    while not (children := server.children(recursive=True)):
        time.sleep(0.05)
    served.process.terminate()
    assert served.process.wait(120) in (0, -signal.SIGTERM)
    assert psutil.wait_procs(children, 30)[1] == []
    current = served.studies / ".pe" / "history" / "two" / "annotation" / "current.json"
    assert json.loads(current.read_text())["revision"] == saved["revision"]
    assert served.audit()[-1]["did"] == "trained"
    assert not any(path.is_file() for path in (served.studies / ".pe" / "tmp").rglob("*"))
