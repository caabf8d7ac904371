"""The client against a real archive (Orthanc), and against a server that misbehaves in every way met in hospitals."""

import io
import json
import logging
import socket
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pydicom
import pytest
from conftest import dicom_slice
from orthanc import PASSWORD, USER, Orthanc, running_orthanc

from pe_app.cli.options import archive_access
from pe_app.common.errors import InputError
from pe_app.common.progress import Cancelled
from pe_app.ct.volume_io import read_volume
from pe_app.pacs.dicomweb import BATCH_BYTES, Access, Archive, ArchiveSeries, Incomplete, Limits, Unavailable

QUICK = Limits(connect_s=2, read_s=1, total_s=2, waits_s=(0.01, 0.01))


def write_study(
    folder: Path, number: int, *, slices: int = 3, series: int = 1, description: str = "PE", patient: str = ""
) -> list[Path]:
    """A CT series of noise; study ``1.2.<number>``, series ``1.2.<number>.<series>``."""
    stored = np.random.default_rng((number, series)).integers(0, 2000, (slices, 8, 8), np.uint16)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for k in range(slices):
        dataset = dicom_slice(
            stored[k],
            (-100.0, -120.0, -300 + 2.5 * k),
            StudyInstanceUID=f"1.2.{number}",
            SeriesInstanceUID=f"1.2.{number}.{series}",
            SeriesNumber=series,
            SeriesDescription=description,
            PatientID=patient or f"patient-{number}",
            StudyDate=f"202601{number:02d}",
            StudyTime="101500.000",
            InstanceNumber=k + 1,
        )
        files.append(folder / f"{number}-{series}-{k}.dcm")
        dataset.save_as(files[-1], enforce_file_format=True)
    return files


# --- a real archive


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory):
    folder = tmp_path_factory.mktemp("orthanc")
    with running_orthanc(folder) as archive:
        for number in range(1, 6):
            archive.add(write_study(folder / "sent", number))
        archive.add(write_study(folder / "sent", 5, series=2, slices=6, description="LUNG"))
        yield archive


def client(orthanc: Orthanc, **limits) -> Archive:
    return Archive(Access(orthanc.url, USER, PASSWORD), Limits(waits_s=(0.05,), **limits))


def test_series_are_listed_with_what_the_headers_say(orthanc):
    listed = client(orthanc).series({"PatientID": "patient-5", "SeriesDescription": "LUN*"})
    assert listed == (
        ArchiveSeries("1.2.5", "1.2.5.2", "patient-5", "20260105101500", "LUNG", "", number=2, instances=6),
    )


def test_every_series_is_listed_once_however_small_the_pages(orthanc):
    expected = {*(f"1.2.{number}.1" for number in range(1, 6)), "1.2.5.2"}
    for page in (1, 2, 3, 6, 100):
        listed = [one.series for one in client(orthanc, page=page).series()]
        assert sorted(listed) == sorted(expected), page


def test_a_range_of_dates_limits_the_list(orthanc):
    assert {one.study for one in client(orthanc).series({"StudyDate": "20260102-20260103"})} == {"1.2.2", "1.2.3"}


def test_a_retrieved_series_is_the_one_that_was_sent(orthanc, tmp_path):
    (series,) = client(orthanc).series({"StudyInstanceUID": "1.2.2"})
    seen = []
    client(orthanc).retrieve(series, tmp_path / "fetched", seen.append)
    fetched = {pydicom.dcmread(path).SOPInstanceUID: path for path in (tmp_path / "fetched").iterdir()}
    assert fetched
    held = orthanc.instances()
    assert {uid: path.read_bytes() for uid, path in fetched.items()} == {uid: held[uid] for uid in fetched}
    assert read_volume(tmp_path / "fetched").shape == (3, 8, 8)
    assert (seen[0].done, seen[-1].done, seen[-1].total) == (0, 3, 3)


def test_a_real_series_comes_back_voxel_by_voxel(orthanc, real_data, tmp_path):
    folder = real_data / "ct_lidc0001_contrast"
    orthanc.add([path for path in folder.rglob("*") if path.suffix == ".dcm"])
    truth = read_volume(folder)
    archive = client(orthanc)
    study = truth.source.study_uid
    archive.retrieve_study(archive.studies({"StudyInstanceUID": study})[study], tmp_path / "fetched")
    volume = read_volume(tmp_path / "fetched")
    assert (volume.sha256, volume.affine.tolist()) == (truth.sha256, truth.affine.tolist())
    orthanc.delete_study(study)


def test_a_retrieve_can_be_cancelled_and_leaves_nothing(orthanc, tmp_path):
    (series,) = client(orthanc).series({"StudyInstanceUID": "1.2.2"})

    def cancel(progress):
        if progress.done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        client(orthanc).retrieve(series, tmp_path / "fetched", cancel)
    assert list(tmp_path.iterdir()) == []


def test_what_is_sent_arrives_and_a_second_send_is_recognised(orthanc, tmp_path):
    files = write_study(tmp_path, 20)
    uids = [pydicom.dcmread(file).SOPInstanceUID for file in files]
    archive = client(orthanc)
    assert archive.instances("1.2.20") == set()
    for _ in range(2):
        answer = archive.store(files)
        assert (list(answer.stored), answer.failed) == (uids, {})
    assert archive.instances("1.2.20") == archive.instances("1.2.20", "1.2.20.1") == set(uids)
    held = orthanc.instances()
    assert [pydicom.dcmread(io.BytesIO(held[uid])).pixel_array.tolist() for uid in uids] == [
        pydicom.dcmread(file).pixel_array.tolist() for file in files
    ]
    orthanc.delete_study("1.2.20")


def test_a_wrong_password_is_said(orthanc):
    with pytest.raises(InputError, match=r"refuses user 'reader' \(401\)"):
        Archive(Access(orthanc.url, USER, "guess"), QUICK).series()
    with pytest.raises(InputError, match="refuses requests without a user"):
        Archive(Access(orthanc.url), QUICK).series()


def test_a_series_that_was_deleted_since_is_said(orthanc, tmp_path):
    with pytest.raises(InputError, match=r"has no studies/1\.2\.77/series/1\.2\.77\.1 \(404\)"):
        client(orthanc).retrieve(ArchiveSeries("1.2.77", "1.2.77.1"), tmp_path / "fetched")


def test_an_address_beside_the_dicomweb_root_is_said(orthanc):
    access = Access(orthanc.url.replace("/dicom-web", "/system"), USER, PASSWORD)
    with pytest.raises(InputError, match="check the address"):
        Archive(access, QUICK).series()


def test_an_archive_that_is_down_is_worth_another_try_later(tmp_path):
    with running_orthanc(tmp_path / "archive") as archive:
        archive.add(write_study(tmp_path / "sent", 1))
        asked = client(archive)
        assert len(asked.series()) == 1
        archive.stop()
        with pytest.raises(Unavailable, match="cannot be reached"):
            asked.series()
        archive.start()
        assert len(asked.series()) == 1


# --- a server that misbehaves


class Scripted(ThreadingHTTPServer):
    """Answers every request by the next function of its script; the last one stays."""

    daemon_threads = True

    def __init__(self, *script):
        self.script = list(script)
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def archive(self) -> Archive:
        return Archive(Access(f"http://127.0.0.1:{self.server_port}/dicom-web"), QUICK)

    def __exit__(self, *error):
        self.shutdown()
        super().__exit__(*error)

    def handle_error(self, request, client_address):
        """Connections that the client gave up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        script = self.server.script
        (script.pop(0) if len(script) > 1 else script[0])(self)

    def do_POST(self):
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *arguments):
        pass


def answer(content: bytes | str, kind: str = "application/dicom+json", status: int = 200, **headers: str):
    content = content.encode() if isinstance(content, str) else content

    def send(handler):
        handler.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    return send


def cut_off(content: bytes, kind: str, *, length: int | None = None):
    """Sends and closes, with a Content-Length that promised more or, as Orthanc, none."""

    def send(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", kind)
        if length:
            handler.send_header("Content-Length", str(length))
        handler.end_headers()
        handler.wfile.write(content)
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_RDWR)

    return send


def reset(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)


def stall(handler):
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b"[")
    handler.wfile.flush()
    time.sleep(2.5)


def trickle(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(60):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def listed(*series: str) -> str:
    tags = [{"0020000D": {"Value": [one.rpartition(".")[0]]}, "0020000E": {"Value": [one]}} for one in series]
    return json.dumps(tags)


MULTIPART = 'multipart/related; type="application/dicom"; boundary="b b"'
SERIES = ArchiveSeries("1.2.1", "1.2.1.1", instances=3)


def multipart(parts: list[bytes], preamble: bytes = b"") -> bytes:
    return (
        preamble
        + b"".join(b"--b b\r\nContent-Type: application/dicom\r\n\r\n" + part + b"\r\n" for part in parts)
        + b"--b b--\r\n"
    )


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> list[bytes]:
    return [file.read_bytes() for file in write_study(tmp_path_factory.mktemp("parts"), 1)]


@pytest.mark.parametrize(
    ("misbehave", "error", "says"),
    [
        (answer("<html>Sign in</html>", "text/html"), InputError, "expected DICOM JSON, got 20 bytes of text/html"),
        (answer("[" * 100_000), InputError, "expected DICOM JSON"),
        (answer('{"error": "no"}'), InputError, "no list of DICOM objects"),
        (answer("[1, 2]"), InputError, "no list of DICOM objects"),
        (answer("gone", status=404), InputError, "has no series"),
        (answer("no", status=400), InputError, "400"),
        (answer("no", status=503), Unavailable, "fails at the moment"),
        (answer("no", status=302, Location="/dicom-web/series"), InputError, "redirects in a circle"),
        (cut_off(b"[{", "application/dicom+json", length=900), Unavailable, "connection broke off"),
        (reset, Unavailable, "connection broke off"),
        (stall, Unavailable, "does not answer within 1 s"),
        (trickle, Unavailable, "took longer than 2 s"),
    ],
)
def test_an_answer_to_a_query_that_makes_no_sense_is_said(misbehave, error, says):
    with Scripted(misbehave) as server, pytest.raises(InputError, match=says) as raised:
        Archive(server.archive.access, Limits(2, 1, 2, waits_s=())).series()
    assert type(raised.value) is error


@pytest.mark.parametrize(
    "no_match",
    [
        answer("", status=204),
        answer("[]"),
        answer(""),
        answer("", status=404),
        answer('{"errorMessage": "No matching"}', "application/dicom+json", status=404),
    ],
)
def test_no_match_is_an_empty_list_however_the_archive_says_it(no_match):
    with Scripted(no_match) as server:
        assert server.archive.series() == ()
    with Scripted(answer(listed("1.2.1.1")), no_match) as server:
        assert [one.series for one in server.archive.series()] == ["1.2.1.1"]


@pytest.mark.parametrize("bad", ["1.2.840.A7", "../../etc.1", ""])
def test_one_series_with_an_invalid_uid_is_left_out_with_a_warning(bad, caplog):
    items = json.loads(listed("1.2.1.1", "1.2.1.2"))
    items[1]["0020000E"] = {"Value": [bad]}
    with Scripted(answer(json.dumps([*items, {}])), answer("[]")) as server:
        assert [one.series for one in server.archive.series()] == ["1.2.1.1"]
    assert "2 series with an invalid UID are left out of 3" in caplog.text


@pytest.mark.parametrize(("frames", "taken"), [(300, True), (1, False), (None, True)])
def test_an_enhanced_ct_of_one_instance_is_a_study(frames, taken, caplog):
    series = json.loads(listed("1.2.1.1"))
    series[0]["00201209"] = {"Value": [1]}
    instance = {**series[0], "00080018": {"Value": ["1.2.1.1.1"]}, "00280008": {"Value": [frames] if frames else []}}
    with Scripted(answer(json.dumps(series)), answer("[]"), answer(json.dumps([instance])), answer("[]")) as server:
        assert list(server.archive.studies()) == (["1.2.1"] if taken else [])
    assert ("1 series of fewer than 20 slices are left out" in caplog.text) == (not taken)


def test_an_endless_answer_is_not_kept_in_memory(monkeypatch):
    monkeypatch.setattr("pe_app.pacs.dicomweb.MAX_JSON_BYTES", 1 << 20)
    with Scripted(answer(b"[" + b" " * (3 << 20))) as server, pytest.raises(InputError, match="larger than 1 MB"):
        server.archive.series()


def test_failures_that_pass_are_tried_again():
    with Scripted(answer("", status=502), reset, answer(listed("1.2.1.1")), answer("", status=204)) as server:
        assert [one.series for one in server.archive.series()] == ["1.2.1.1"]
        assert len(server.asked) == 4


def test_an_archive_that_does_not_page_is_not_asked_for_ever():
    every = answer(listed(*(f"1.2.{number}" for number in range(700))))
    with Scripted(every) as server:
        assert len(server.archive.series()) == 700
        assert len(server.asked) == 1  # more than a page at once: it does not page


def test_an_archive_that_pages_less_than_asked_is_asked_on():
    pages = [answer(listed(*(f"1.2.{number}" for number in range(start, start + 10)))) for start in (0, 10)]
    with Scripted(*pages, answer(listed("1.2.20")), answer("[]")) as server:
        assert len(server.archive.series()) == 21
        assert [path.partition("offset=")[2] for path in server.asked] == ["0", "10", "20", "21"]


def test_an_archive_that_repeats_its_first_page_is_warned_of(caplog):
    with Scripted(answer(listed(*(f"1.2.{number}" for number in range(500))))) as server:
        assert len(server.archive.series()) == 500
    assert "lists the first 500 only" in caplog.text


def test_series_of_other_modalities_are_left_out_where_the_archive_does_not_filter():
    mixed = json.loads(listed("1.2.1.1", "1.2.1.2"))
    mixed[1]["00080060"] = {"Value": ["SR"]}
    with Scripted(answer(json.dumps(mixed)), answer("[]")) as server:
        assert [one.series for one in server.archive.series()] == ["1.2.1.1"]


def not_dicom(parts):
    return answer(multipart([parts[0], b"<html>", parts[2]]), MULTIPART)


def of_another_patient(parts):
    return answer(multipart([part.replace(b"1.2.1.1\0", b"1.2.9.9\0") for part in parts]), MULTIPART)


@pytest.mark.parametrize(
    ("misbehave", "error", "says"),
    [
        (lambda parts: answer("<html>", "text/html"), InputError, "expected a series as multipart/related, got 'text"),
        (lambda parts: answer(parts[0], "application/dicom"), InputError, "expected a series as multipart/related"),
        (lambda parts: answer("", "multipart/related"), InputError, "expected a series as multipart/related"),
        (lambda parts: answer("nothing of it", MULTIPART), InputError, "comes as a damaged multipart"),
        (lambda parts: answer("", MULTIPART), Incomplete, "cut off after 0 of 3"),
        (lambda parts: answer(multipart([]), MULTIPART), Incomplete, "sent 0 instances"),
        (lambda parts: answer(multipart(parts[:2]), MULTIPART), Incomplete, "sent 2 instances of .* but lists 3"),
        (lambda parts: cut_off(multipart(parts)[:-700], MULTIPART), Incomplete, "cut off after 2 of 3"),
        (lambda parts: cut_off(multipart(parts)[:-4], MULTIPART), Incomplete, "cut off after 3 of 3|after 2 of 3"),
        (lambda parts: cut_off(multipart(parts)[:900], MULTIPART, length=4000), Unavailable, "connection broke off"),
        (not_dicom, InputError, "is not DICOM"),
        (of_another_patient, InputError, r"sent an instance of 1\.2\.9\.9"),
        (lambda parts: answer("", status=500), Unavailable, "fails at the moment"),
    ],
)
def test_a_series_that_does_not_come_whole_leaves_nothing_behind(misbehave, error, says, parts, tmp_path):
    with Scripted(misbehave(parts)) as server, pytest.raises(InputError, match=says) as raised:
        server.archive.retrieve(SERIES, tmp_path / "fetched")
    assert type(raised.value) is error
    assert list(tmp_path.iterdir()) == []


def test_a_series_that_broke_off_is_fetched_again(parts, tmp_path):
    whole = multipart(parts, preamble=b"\r\n")
    with Scripted(cut_off(whole[:1000], MULTIPART), answer("", status=503), answer(whole, MULTIPART)) as server:
        server.archive.retrieve(SERIES, tmp_path / "fetched")
    assert [path.read_bytes() for path in sorted((tmp_path / "fetched").iterdir())] == parts


def test_parts_are_found_wherever_the_network_cuts_them(parts, tmp_path):
    traps = [part + tail for part, tail in zip(parts, (b"\r\n--b", b"\r\n--b b", b"\r\n--"), strict=True)]
    whole = multipart(traps[:1] + parts[1:2] + traps[2:])

    def in_pieces(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", MULTIPART)
        handler.end_headers()
        for start in range(0, len(whole), 97):
            handler.wfile.write(whole[start : start + 97])
            handler.wfile.flush()

    with Scripted(in_pieces) as server:
        server.archive.retrieve(SERIES, tmp_path / "fetched")
    fetched = [path.read_bytes() for path in sorted((tmp_path / "fetched").iterdir())]
    assert fetched == [traps[0], parts[1], traps[2]]


def test_instances_that_the_archive_refuses_are_named_with_their_reasons(tmp_path):
    files = write_study(tmp_path, 1, slices=5)
    uids = [str(pydicom.dcmread(file).SOPInstanceUID) for file in files]

    def refusal(uid, reason):
        return {"00081155": {"vr": "UI", "Value": [uid]}, "00081197": {"vr": "US", "Value": [reason]}}

    said = {
        "00081199": {"vr": "SQ", "Value": [{"00081155": {"vr": "UI", "Value": [uids[0]]}}]},
        "00081198": {
            "vr": "SQ",
            "Value": [refusal(*one) for one in zip(uids[1:], (0x0111, 0x0122, 0xA702), strict=False)],
        },
    }
    for status in (202, 409, 400):
        with Scripted(answer(json.dumps(said), status=status)) as server:
            outcome = server.archive.store(files)
        assert outcome.stored == (uids[0], uids[1])  # refused as a duplicate: it is there
        assert outcome.failed == {
            uids[2]: "the archive does not take this kind of object (0x0122)",
            uids[3]: "the archive is full (0xA702)",
            uids[4]: "the archive does not confirm that it stored it",
        }


@pytest.mark.parametrize(
    ("misbehave", "error", "says"),
    [
        (answer("<html>", "text/html"), InputError, "expected DICOM JSON"),
        (answer("[]"), InputError, "does not list which instances were stored"),
        (answer("too large", status=413), InputError, "413"),
        (answer("", status=302, Location="https://elsewhere"), InputError, "302 .* to https://elsewhere"),
        (answer("", status=503), Unavailable, r"fails at the moment .*\(0 of 3 instances were stored before\)"),
    ],
)
def test_a_send_that_fails_as_a_whole_is_said(misbehave, error, says, tmp_path):
    with Scripted(misbehave) as server, pytest.raises(InputError, match=says) as raised:
        server.archive.store(write_study(tmp_path, 1))
    assert type(raised.value) is error


def test_what_is_no_dicom_file_is_not_sent(tmp_path):
    (tmp_path / "note.txt").write_text("no image")
    files = [*write_study(tmp_path, 1), tmp_path / "note.txt"]
    with Scripted(answer("{}")) as server, pytest.raises(InputError, match=r"note\.txt: it is not a DICOM instance"):
        server.archive.store(files)
    assert server.asked == []


def test_many_instances_are_sent_in_several_requests(tmp_path, monkeypatch):
    files = write_study(tmp_path, 1, slices=4)
    monkeypatch.setattr("pe_app.pacs.dicomweb.BATCH_BYTES", 2 * files[0].stat().st_size + 10)
    everything = [{"00081155": {"Value": [str(pydicom.dcmread(file).SOPInstanceUID)]}} for file in files]
    with Scripted(answer(json.dumps({"00081199": {"Value": everything}}))) as server:
        assert len(server.archive.store(files).stored) == 4
    assert len(server.asked) == 2
    assert BATCH_BYTES > 1 << 20


# --- addresses and passwords


def test_an_archive_with_the_hospitals_own_certificate_is_trusted_only_when_told(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=pacs",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with Scripted(answer(listed("1.2.1.1"))) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        url = f"https://127.0.0.1:{server.server_port}"
        assert [one.series for one in Archive(Access(url, ca=certificate), QUICK).series()] == ["1.2.1.1"]
        with pytest.raises(InputError, match="give the certificate of the hospital's authority with --ca"):
            Archive(Access(url), QUICK).series()


@pytest.mark.parametrize(
    "url", ["ftp://pacs/dicom-web", "pacs/dicom-web", "http://", "http://pacs:x/", "http://a/b?c=d"]
)
def test_what_is_no_address_of_an_archive_is_refused(url):
    with pytest.raises(InputError, match="archive"):
        Access(url)


def test_a_password_in_the_address_is_refused_without_repeating_it():
    with pytest.raises(InputError, match="PE_ARCHIVE_PASSWORD") as raised:
        Access("https://reader:s3cret@pacs/dicom-web")
    assert "s3cret" not in str(raised.value)
    assert "s3cret" not in repr(Access("https://pacs", "reader", "s3cret"))


def test_the_password_comes_from_the_environment_or_a_file(tmp_path, monkeypatch):
    file = tmp_path / "password"
    file.write_text("geheim ü\nsecond line\n", encoding="utf-8")
    monkeypatch.delenv("PE_ARCHIVE_PASSWORD", raising=False)
    assert archive_access("https://pacs/", "reader", file, None) == Access("https://pacs", "reader", "geheim ü")
    with pytest.raises(InputError, match="the password is missing"):
        archive_access("https://pacs/", "reader", None, None)
    monkeypatch.setenv("PE_ARCHIVE_PASSWORD", "from outside")
    assert archive_access("https://pacs/", "reader", None, None).password == "from outside"


def test_a_password_that_would_travel_in_the_clear_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        Archive(Access("http://127.0.0.1/dicom-web", "reader", "x"))
        assert caplog.text == ""
        Archive(Access("http://pacs.example/dicom-web", "reader", "x"))
    assert "unencrypted" in caplog.text
