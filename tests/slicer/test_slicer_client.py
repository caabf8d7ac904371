"""The Slicer module's requests, over real sockets: every failure is its own sentence, and nothing is half-done."""

import json
import socket
import threading
import time

import numpy as np
import pytest
import slicer_paths  # noqa: F401
from fake_server import FakeServer
from phantoms import CLOT_SLICE, SHAPE, add_chest, chest
from PulmonaryEmbolismLib.answers import Detection
from PulmonaryEmbolismLib.client import Client
from PulmonaryEmbolismLib.images import read_image
from PulmonaryEmbolismLib.transport import Conflict, LabelConflict, ServerError, normalised_address


def silent(text, done=0, total=0):
    pass


@pytest.fixture
def server(tmp_path):
    server = FakeServer()
    add_chest(server, "study 1", tmp_path)
    yield server
    server.close()


@pytest.fixture
def client(server):
    return Client(server.address, reader="Ada")


def sentence(client):
    with pytest.raises(ServerError) as caught:
        client.connect()
    return str(caught.value)


def test_an_address_gets_the_scheme_that_is_missing_and_loses_what_follows_the_port():
    assert normalised_address(" pe.hospital.example:8000/ ") == "http://pe.hospital.example:8000"
    assert normalised_address("https://[::1]:8443/info/") == "https://[::1]:8443"


@pytest.mark.parametrize("typed", ["", "ftp://x", "http://", "127.0.0.1:port"])
def test_what_is_no_address_is_refused_before_anything_is_sent(typed):
    with pytest.raises(ServerError, match=r"address|port"):
        Client(typed)


def test_the_server_says_who_it_is(client, server):
    found = client.connect()
    assert (found.model.name, found.model.trained) == ("starter", True)
    assert "random" in found.strategies


def test_each_way_of_not_connecting_has_its_own_sentence(server, client):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed_port = free.getsockname()[1]
    sentences = [sentence(Client(f"http://127.0.0.1:{closed_port}")), sentence(Client("http://no-such-host.invalid"))]
    sentences.append(sentence(Client(server.address.replace("http", "https"))))
    server.app = "web"
    sentences.append(sentence(client))
    server.app = "monailabel"
    sentences.append(sentence(client))
    server.app, server.api = "pe", 2
    sentences.append(sentence(client))
    server.api, server.token = 1, "secret"
    sentences.append(sentence(client))
    sentences.append(sentence(Client(server.address, token="wrong")))
    server.down = True
    sentences.append(sentence(client))
    assert len(set(sentences)) == len(sentences)
    expected = (
        "started",
        "spelling",
        "try http://",
        "Another program",
        "not the pulmonary embolism app",
        "update this module",
        "asks for a token",
        "does not accept this token",
        "closed before an answer",
    )
    for words, text in zip(expected, sentences, strict=True):
        assert words in text


def test_a_server_that_never_answers_is_given_up_with_a_sentence(monkeypatch):
    import PulmonaryEmbolismLib.transport as module

    monkeypatch.setattr(module, "READ_SECONDS", 0.2)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        with pytest.raises(ServerError, match="did not answer in time"):
            Client(f"http://127.0.0.1:{mute.getsockname()[1]}").worklist()


def test_the_right_token_is_sent_as_a_bearer_token(server):
    server.token = "secret"
    assert Client(server.address, token=" secret ").connect().version == "0.1.0"


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path):
    import ssl
    import subprocess

    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2",
         "-keyout", key, "-out", certificate], capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("openssl is not installed")
    server = FakeServer()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server._http.socket = context.wrap_socket(server._http.socket, server_side=True)
    assert "certificate" in sentence(Client(server.address.replace("http", "https")))
    server.close()


def test_a_study_brings_its_schedule_and_fields_that_are_new_or_missing_break_nothing(server, client):
    known = server.studies["study 1"]
    known["row"]["colour"] = "blue"
    known["image"].pop("spacing_mm")
    study = client.study("study 1")
    assert [s.slice_index for s in study.schedule if s.why == "suspicious"] == [CLOT_SLICE]
    assert study.size == SHAPE


def test_an_image_is_fetched_once_and_kept_under_its_hash(server, client, tmp_path):
    sha = client.study("study 1").sha256
    first = client.download_image("study 1", sha, tmp_path / "cache", silent)
    again = client.download_image("study 1", sha, tmp_path / "cache", silent)
    assert first == again
    assert first.name == f"{sha}.nrrd"
    assert server.requests.count(("GET", "/datastore/image")) == 1
    assert np.array_equal(read_image(first).voxels, chest(0)[0])


def test_a_download_that_is_called_off_leaves_nothing_behind(client, tmp_path):
    def stop(text, done=0, total=0):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        client.download_image("study 1", "ab", tmp_path / "cache", stop)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_detection_comes_with_its_attention_volume_and_tells_its_progress(server, client, tmp_path, monkeypatch):
    import PulmonaryEmbolismLib.client as module

    monkeypatch.setattr(module, "POLL_SECONDS", 0.03)
    told = []
    detection, path = client.detect("study 1", tmp_path, lambda text, done=0, total=0: told.append((text, done, total)))
    assert path.read_bytes() == server.studies["study 1"]["attention"]
    assert detection.probability == 0.91
    assert any("encode slabs" in text and total == 5 for text, _, total in told)


def test_calling_off_a_detection_reaches_the_server(server, client, tmp_path, monkeypatch):
    import PulmonaryEmbolismLib.client as module

    monkeypatch.setattr(module, "POLL_SECONDS", 0.03)
    server.detection_steps = 100

    def stop(text, done=0, total=0):
        raise InterruptedError

    with pytest.raises(ServerError, match="cancelled"):
        client.detect("study 1", tmp_path, stop)


def test_evidence_that_is_empty_or_not_a_number_is_left_out():
    detection = Detection.from_json(
        json.loads('{"status": "analysed", "probability": NaN, "evidence": [{"slice_index": 3, "probability": NaN}, '
                   '{"slice_index": 4, "probability": 0.5}], "candidates": null, "model": null}')
    )  # fmt: skip
    assert detection.probability is None
    assert [e.slice_index for e in detection.evidence] == [4]


def test_a_save_over_another_version_is_a_conflict_that_carries_it(server, client, tmp_path):
    label = tmp_path / "label.seg.nrrd"
    label.write_bytes(b"first")
    annotation = {
        "schema": "pe-annotation/1",
        "image": {},
        "slices": [{"slice_index": 4, "z_mm": 1.0, "state": "none"}],
    }
    saved = client.put_annotation("study 1", annotation, label, None, silent)
    assert (saved.tag, saved.accepted) == ("draft", 1)
    with pytest.raises(Conflict) as caught:
        client.put_annotation("study 1", annotation, label, None, silent)
    assert caught.value.revision == saved.revision
    assert caught.value.annotation == annotation


def test_a_label_over_another_readers_is_a_conflict_that_carries_it(server, client):
    revision = client.put_study_label("study 1", "positive", None)
    with pytest.raises(LabelConflict) as caught:
        Client(server.address, reader="Bo").put_study_label("study 1", "negative", None)
    assert (caught.value.label, caught.value.reader, caught.value.revision) == ("positive", "Ada", revision)
    client.put_study_label("study 1", "", revision)
    assert client.study("study 1").row.label == ""


def test_a_server_killed_in_mid_upload_is_an_error_worth_retrying(server, client, tmp_path):
    label = tmp_path / "label.seg.nrrd"
    label.write_bytes(bytes(3_000_000))
    server.die_in_upload = True
    with pytest.raises(ServerError) as caught:
        client.put_annotation("study 1", {"slices": []}, label, None, silent)
    assert caught.value.worth_retrying


def test_two_readers_asking_at_once_get_different_studies(server, client, tmp_path):
    add_chest(server, "study 2", tmp_path, seed=1)
    other = Client(server.address, reader="Bo")
    assert {client.next_study("random"), other.next_study("random")} == {"study 1", "study 2"}
    with pytest.raises(ServerError, match="read by Ada"):
        other.lease("study 1")


def test_many_threads_may_use_one_client(client):
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(client.worklist())) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(answers) == 12


def test_jobs_deliver_on_the_thread_that_polls_and_drop_what_nobody_waits_for():
    from PulmonaryEmbolismLib.jobs import Cancelled, Runner

    heard, succeeded, broken = [], [], []
    runner = Runner(lambda job: succeeded.append(job.group), broken.append)
    here = threading.get_ident()
    gate = threading.Event()
    runner.submit(
        "a", "", lambda job: threading.get_ident(), lambda value: heard.append((value, threading.get_ident()))
    )
    runner.submit("late", "", lambda job: gate.wait(5), lambda value: heard.append("late"))
    runner.submit("c", "", lambda job: 1, lambda value: [][1])
    runner.submit("a", "", lambda job: 1 / 0, None, lambda error: heard.append(type(error)))
    stopped = runner.submit("b", "", lambda job: gate.wait(5), None, lambda error: heard.append(error))
    runner.drop("late")
    runner.cancel(stopped)
    gate.set()
    end = time.monotonic() + 5
    while (len(heard) < 3 or not broken) and time.monotonic() < end:
        runner.poll()
    time.sleep(0.05)
    runner.poll()
    assert isinstance(heard[0], Cancelled)
    assert ZeroDivisionError in heard
    there, delivered = next(pair for pair in heard if isinstance(pair, tuple))
    assert delivered == here != there
    assert "late" not in heard
    assert sorted(succeeded) == ["a", "c"]
    assert [type(error) for error in broken] == [IndexError]
    assert runner.jobs() == []
