"""Bad requests: what is sent to the server, and which answers are right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
import requests

from campaign import corpus
from campaign.journal import annotation, label_file, nrrd_bytes
from campaign.world import STUDIES, World

REFUSED = range(400, 500)
OR_READ = (200, *REFUSED)
"""For what is odd but does no harm."""
HARMLESS = ("sizeof_hdr", "dim0 4", "bitpix", "vox_offset", "slope", "magic of a pair", "extension", "behind the data")
"""Lies of a volume's header that may be overlooked, since the CT is in the file all the same."""

Send = Callable[[], requests.Response]
Bad = tuple[str, Send, Sequence[int]]

ANNOTATIONS: Mapping[str, Sequence[object]] = {
    "schema": [None, "pe-annotation/3", 1, ["pe-annotation/2"]],
    "image": [None, {}, [], "x", 5],
    "slices": [None, {}, [5], [[]], [{}, {}, {}], "x"],
}
IMAGES: Mapping[str, Sequence[object]] = {
    "sha256": [None, 5, "0" * 64, "x", "A" * 64],
    "size": [None, [1, 2, 3], [32, 64, 1e9], "x", [32, 64], [32, 64, -64], [32.5, 64, 64]],
    "spacing_mm": [None, [0, 0, 0], [1e9, 1e9, 1e9], "x", [5, 5], [-5, 5, 5], [1, 1, 1]],
}
SLICES: Mapping[str, Sequence[object]] = {
    "slice_index": [-1, 10**9, 10**400, 1.5, True, "3", None, [1]],
    "z_mm": [1e6, "x", None, 500.0, [0]],
    "state": ["EMBOLISM", "", None, ["none"], 0],
    "reader": ["x" * 65, "a|b", 'a"b', "a\nb", 5, "\ud800", "a\\b"],
    "time": ["yesterday", "2026-13-45T99:99:99Z", 5, "2026-11-02T08:00:00+01:00"],
}
LABELS: Mapping[str, tuple[bytes, bytes]] = {
    "another spacing": (b"(5.0,0,0)", b"(4.9,0,0)"),
    "another origin": (b"space origin: (", b"space origin: (1"),
    "another space": (b"left-posterior", b"right-posterior"),
    "label value 0": (b"\n\n", b"\nSegment0_Name:=embolism\nSegment0_LabelValue:=0\n\n"),
    "a layer that is not there": (b"\n\n", b"\nSegment0_Name:=embolism\nSegment0_Layer:=9\nSegment0_LabelValue:=1\n\n"),
    "a data file elsewhere": (b"\n\n", b"\ndata file: /etc/passwd\n\n"),
}
SETTINGS: Mapping[str, Sequence[object]] = {
    "epochs": [0, -1, 1e99, "x", [1], {}, True, 1.5, None],
    "learning_rate": [-1, "nan", "1e999", 0],
    "batch": [0, -5, 10**30],
    "width": [0, -8, 10**12],
    "matrix": [7, -64],
    "crop": [10**9, 7],
    "slab_count": [0, -1],
    "filters": [0, -1],
    "validation_fraction": [2, -1, 0],
    "seed": ["x"],
    "synthetic": ["perhaps", 3],
    "slices_per_slab": [4, 0],
}
NO_READER = ("", "x" * 65, "a\nb", "\x00", "\u202e", None, [], {}, 0)
NOT_SERVED = (
    "/reload",
    "/logs/",
    "/logs/gpu",
    "/model/detection",
    "/session/",
    "/proxy/dicom/x",
    "/ohif/",
    "/auth/token",
)


def volumes(world: World) -> Iterator[Bad]:
    """Bad volumes as new CTs, some also as labels and outlines."""
    study = STUDIES[0]
    params, _ = annotation(world, study, world.schedule(study)[:2], "ann", "00", np.random.default_rng(2))
    for number, (name, content) in enumerate(corpus.volumes()):
        file = name.replace("/", "|")
        harmless = any(word in name for word in HARMLESS)
        new = {"params": {"image": f"new{number}"}, "files": {"file": (file, content)}}
        yield f"new CT: {name}", _ask(world, "PUT", "/datastore/image", **new), OR_READ if harmless else REFUSED
        if number % 7 == 0 and not harmless and not any(word in name for word in ("all zero", "shifted to 0")):
            yield f"label: {name}", _label(world, {}, content, "second", file), REFUSED
            yield f"annotation: {name}", _label(world, params, content, "draft", file), REFUSED


def saves(world: World) -> Iterator[Bad]:
    """Labels, params and annotations that do not fit their study or themselves."""
    study = STUDIES[0]
    params, label = annotation(world, study, world.schedule(study)[:4], "ann", "00", np.random.default_rng(3))
    body: dict[str, Any] = params["annotation"]
    zeros = np.zeros(world.volume(study).shape, np.uint8)

    for text in corpus.texts()[1:]:
        yield f"params {text[:30]}", _label(world, text, label, "draft"), REFUSED
        for what, path, query in (
            ("image info", "/datastore/image/info", {"image": study}),
            ("label info", "/datastore/label/info", {"label": STUDIES[1], "tag": "draft"}),
        ):
            yield f"{what} {text[:30]}", _ask(world, "PUT", path, params=query, data={"info": text}), REFUSED

    wrong = [*([], 5, "x", {}, None)]
    wrong += [{**body, key: value} for key, values in ANNOTATIONS.items() for value in values]
    wrong += [{**body, "slices": body["slices"] * 2}, {**body, "slices": body["slices"][:1] * 100_000}]
    wrong += [{**body, "image": {**body["image"], key: value}} for key, values in IMAGES.items() for value in values]
    for key, values in SLICES.items():
        wrong += [{**body, "slices": [{**body["slices"][0], key: value}, *body["slices"][1:]]} for value in values]
    for number, said in enumerate(wrong):
        allowed = OR_READ if said is None else REFUSED  # an annotation that is null is none
        text = json.dumps({"annotation": said})
        yield f"annotation {number} {text[15:70]!a}", _label(world, text, label, "draft"), allowed
    nothing = {**body, "slices": [{**entry, "state": "embolism"} for entry in body["slices"]]}
    empty = nrrd_bytes(world, study, zeros)
    yield "embolism without an outline", _label(world, {"annotation": nothing}, empty, "draft"), REFUSED
    drawn = zeros.copy()
    drawn[body["slices"][0]["slice_index"] + 1, 5:9, 5:9] = 1
    yield "an outline that is not listed", _label(world, params, nrrd_bytes(world, study, drawn), "draft"), REFUSED
    for value in (5, "", "x", [], {}, "../000001", "000001-00000000"):
        yield f"based_on {value}", _label(world, {**params, "based_on": value}, label, "draft"), REFUSED

    for what, changed in (("half", zeros[:16]), ("transposed", zeros.transpose(1, 2, 0)), ("plane", zeros[:1])):
        content = nrrd_bytes(world, study, np.ascontiguousarray(changed))
        yield f"label of another size: {what}", _label(world, {}, content, "second"), REFUSED
    for what, (old, new) in LABELS.items():
        yield f"outlines with {what}", _label(world, params, label.replace(old, new, 1), "draft"), REFUSED
    for what, values, kind in (
        ("halves", np.full(zeros.shape, 0.5, np.float32), "float"),
        ("negative numbers", np.full(zeros.shape, -3, np.int16), "int16"),
        ("no numbers", np.full(zeros.shape, np.nan, np.float32), "float"),
        ("large numbers", np.full(zeros.shape, 60000, np.uint16), "uint16"),
    ):
        content = nrrd_bytes(world, study, values).replace(b"uint8", kind.encode(), 1)
        yield f"label of {what}", _label(world, {}, content, "second", "label.nrrd"), REFUSED
    for name in ("label.exe", "label", "../label.txt", "label.nrrd.py", "x" * 3000):
        yield f"file name {name[:30]}", _label(world, {}, label, "second", name), REFUSED
    yield "not that format", _label(world, {}, label, "second", "label.nii.gz"), REFUSED
    yield "no file", _ask(world, "PUT", f"/datastore/label?image={study}", data={"params": "{}"}), REFUSED
    yield "no study", _ask(world, "PUT", "/datastore/label", files={"label": ("a.nrrd", label)}), REFUSED
    yield "unknown study", lambda: world.put_label("nobody", {}, label), REFUSED
    for word in ("maybe", ["positive"], 5, {}, None):
        info = {"info": json.dumps({"pe_label": word})}
        send = _ask(world, "PUT", f"/datastore/image/info?image={study}", data=info)
        yield f"study label {word}", send, REFUSED
    plain = label_file(world, STUDIES[1], [1])
    yield "a label over an annotation", lambda: world.put_label(STUDIES[1], {}, plain, "draft"), REFUSED


def names(world: World) -> Iterator[Bad]:
    """Ids, tags and names that are paths or nothing, in every place that takes one."""
    ct, label = (world.studies / "study0.nrrd").read_bytes(), label_file(world, STUDIES[0], [1])
    for name in corpus.names():
        part = quote(name, safe="")
        image = {"image": name}
        a_tag = OR_READ if name in ("", "link", "study0.nrrd", "datastore_v2.json") else REFUSED
        tag = {"params": json.dumps({"save_label": True, "label_tag": name})}
        override = {"params": json.dumps({"image": name, "model": name})}
        asked: tuple[tuple[str, str, dict[str, Any], Sequence[int]], ...] = (
            ("GET", "/datastore/image", {"params": image}, REFUSED),
            ("HEAD", "/datastore/image", {"params": image}, REFUSED),
            ("GET", "/datastore/image/info", {"params": image}, REFUSED),
            ("GET", "/datastore/label", {"params": {"label": name, "tag": "final"}}, REFUSED),
            ("GET", "/datastore/label", {"params": {"label": STUDIES[1], "tag": name}}, REFUSED),
            ("GET", "/datastore/label/info", {"params": {"label": STUDIES[1], "tag": name}}, REFUSED),
            ("DELETE", "/datastore/label", {"params": {"id": name, "tag": "final"}}, REFUSED),
            ("DELETE", "/datastore/label", {"params": {"id": STUDIES[1], "tag": name}}, REFUSED),
            ("DELETE", "/datastore/image", {"params": {"id": name}}, REFUSED),
            ("PUT", "/datastore/label", {"params": image, "files": {"label": ("a.nrrd", label)}}, REFUSED),
            ("PUT", "/datastore/label", _query(STUDIES[2], name, label), a_tag),
            ("PUT", "/datastore/image", {"params": image, "files": {"file": ("a.nrrd", ct)}}, OR_READ),
            ("PUT", "/datastore/image", {"files": {"file": (f"{name}.nrrd", ct)}}, OR_READ),
            ("PUT", "/datastore/image/info", {"params": image, "data": {"info": "{}"}}, OR_READ),
            ("POST", "/infer/detection", {"params": image}, OR_READ),
            ("POST", f"/infer/{part}", {"params": {"image": STUDIES[0]}}, REFUSED),
            ("POST", "/infer/candidates", {"params": {"image": STUDIES[3]}, "data": tag}, a_tag),
            ("POST", "/infer/detection", {"params": {"image": STUDIES[0]}, "data": override}, OR_READ),
            ("GET", f"/pe/studies/{part}", {}, OR_READ),
            ("GET", f"/pe/studies/{part}/history", {}, OR_READ),
            ("GET", f"/pe/studies/{STUDIES[1]}/history/{part}", {}, OR_READ if part in ("", ".", "..") else REFUSED),
            ("GET", f"/pe/studies/{STUDIES[1]}/history/{part}/label", {}, REFUSED),
            ("POST", f"/pe/studies/{STUDIES[1]}/history/{part}/restore", {"json": {}}, REFUSED),
            ("POST", f"/pe/studies/{part}/lease", {"json": {"reader": "x"}}, OR_READ),
            ("GET", f"/pe/jobs/{part}", {}, REFUSED),
            ("POST", f"/pe/models/{part}/pin", {}, REFUSED),
            ("POST", f"/train/{part}", {"json": {}}, REFUSED),
            ("POST", f"/batch/infer/{part}", {"json": {}}, REFUSED),
            ("POST", f"/activelearning/{part}", {"json": {}}, REFUSED),
        )
        for method, path, arguments, allowed in asked:
            yield f"{method} {path[:60]} {name[:30]!a}", _ask(world, method, path, **arguments), allowed


def bodies(world: World) -> Iterator[Bad]:
    """JSON bodies and settings."""
    lease = f"/pe/studies/{STUDIES[0]}/lease"
    busy = (429, *OR_READ)
    for path in ("/train/encoder", "/batch/infer/detection", "/activelearning/next_unreviewed", lease):
        for text in corpus.texts():
            unused = text in ("", "null") or (text.startswith('{"') and "train" not in path)
            yield f"{path} {text[:30]!a}", _post(world, path, text), busy if unused else REFUSED
    for key, values in SETTINGS.items():
        for value in values:
            yield f"train {key} {str(value)[:20]}", _post(world, "/train/encoder", json.dumps({key: value})), REFUSED
    for value in ("x", [1], {}, 1e99, -1, "1e5"):
        body = json.dumps({"max_batch_size": value})
        yield f"batch of {value}", _post(world, "/batch/infer/detection", body), busy if value == {} else REFUSED
    yield "batch of unknown images", _post(world, "/batch/infer/detection?images=some", "{}"), REFUSED
    for value in NO_READER:
        yield f"lease for {value!a}", _post(world, lease, json.dumps({"reader": value})), REFUSED
    for value in ("x" * 65, "a\nb", "\x00"):
        said = json.dumps({"reader": value})
        yield f"next for {value!a}", _post(world, "/activelearning/next_unreviewed", said), REFUSED
    infer = f"/infer/detection?image={STUDIES[0]}"
    for text in corpus.texts()[1:]:
        allowed = OR_READ if text.startswith('{"a": "') else REFUSED
        yield f"infer {text[:30]!a}", _ask(world, "POST", infer, data={"params": text}), allowed
    for value in ("x" * 100_000, 5, [], {"a": 1}, "../../x", "\x00"):
        said = {"params": json.dumps({"job": value})}
        yield f"infer job {str(value)[:20]!a}", _ask(world, "POST", infer, data=said), OR_READ
    for query in ("output=everything", "output=", "output=dicom_seg"):
        yield f"infer {query}", _ask(world, "POST", f"{infer}&{query}"), REFUSED
    yield "infer without a study", _ask(world, "POST", "/infer/detection"), REFUSED
    yield "infer of an upload", _ask(world, "POST", "/infer/detection", files={"file": ("a.nrrd", b"x")}), REFUSED
    yield "unknown output", _ask(world, "GET", "/datastore/?output=everything"), OR_READ
    for path in NOT_SERVED:
        yield f"POST {path}", _ask(world, "POST", path), REFUSED
    many = {f"k{number}": "v" for number in range(2000)}
    files = [("label", (f"{number}.nrrd", b"x")) for number in range(900)]
    yield "900 files", _ask(world, "PUT", f"/datastore/label?image={STUDIES[0]}", files=files), REFUSED
    yield "2000 fields", _ask(world, "PUT", f"/datastore/image/info?image={STUDIES[0]}", data=many), OR_READ


def archives(world: World) -> Iterator[Bad]:
    """Archives in the place of images, labels, sessions and models."""
    for name, content in corpus.archives():
        files = {"file": (name, content)}
        renamed = {"file": ("a.nii.gz", content)}
        session = {"files": {"files": ("a", content)}}
        yield f"new CT {name}", _ask(world, "PUT", "/datastore/image?image=new", files=files), REFUSED
        yield f"new CT named {name}", _ask(world, "PUT", "/datastore/image", files=files), REFUSED
        yield f"{name} as .nii.gz", _ask(world, "PUT", "/datastore/image?image=new", files=renamed), REFUSED
        yield f"session {name}", _ask(world, "PUT", "/session/?uncompress=true", **session), REFUSED
        yield f"model {name}", _ask(world, "PUT", "/model/detection", files=files), REFUSED
        yield f"label {name}", _label(world, {}, content, "second", name), REFUSED


def weights(world: World) -> Iterator[Bad]:
    """Bad weights sent where MONAI Label takes them."""
    for name, content in corpus.weights((world.folder / "model.safetensors").read_bytes()):
        files = {"file": ("model.safetensors", content)}
        yield name, _ask(world, "PUT", "/model/detection", files=files), REFUSED


def raw(world: World) -> Iterator[tuple[str, bytes]]:
    """Hosts, origins, lengths and forms that are wrong, and bytes that are no HTTP."""
    host = f"Host: 127.0.0.1:{world.port}\r\n"
    hosts = (
        "evil.example",
        "127.0.0.1.evil.example",
        "evil.example:80",
        "",
        "[::1",
        "127.0.0.1@evil",
        "\xff",
        "0.0.0.0",
    )
    for name in hosts:
        yield f"host {name}", f"GET /info/ HTTP/1.1\r\nHost: {name}\r\n\r\n".encode("latin-1")
    yield "no host", b"GET /info/ HTTP/1.1\r\n\r\n"
    yield "two hosts", f"GET /info/ HTTP/1.1\r\n{host}Host: evil.example\r\n\r\n".encode()
    own = f"https://127.0.0.1:{world.port}"  # another scheme is another origin
    for origin in ("http://evil.example", "null", "file://", "http://127.0.0.1:1", own, "\xff"):
        for method in ("GET", "OPTIONS", "POST"):
            head = f"{method} /train/encoder HTTP/1.1\r\n{host}Origin: {origin}\r\nContent-Length: 0\r\n\r\n"
            yield f"{method} from {origin}", head.encode("latin-1")
    save = f"PUT /datastore/label?image=study0 HTTP/1.1\r\n{host}"
    for length in ("-1", "x", "1e3", "99999999999999999999", "5, 6", ""):
        yield f"length {length}", f"{save}Content-Length: {length}\r\n\r\n".encode()
    for boundary, body in (
        ("x", b""),
        ("x", b"--x\r\n"),
        ("x", b"--x\r\nContent-Disposition: form-data\r\n\r\n\r\n--x--"),
        ("", b"----"),
        ("x" * 5000, b"--x"),
        ("x", b"--x\r\n" + b"A: b\r\n" * 10000 + b"\r\n--x--"),
        ("x", b"--y--\r\n" * 1000),
    ):
        form = f"Content-Type: multipart/form-data; boundary={boundary}\r\nContent-Length: {len(body)}\r\n\r\n"
        yield f"form {boundary[:5]} {body[:20]!a}", (save + form).encode() + body
    no_boundary = "Content-Type: multipart/form-data\r\nContent-Length: 2\r\n\r\nxx"
    yield "form without a boundary", (save + no_boundary).encode()
    post = f"POST /train/encoder HTTP/1.1\r\n{host}"
    two = "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\n\r\n"
    yield "both lengths", (post + two).encode()
    yield "bad chunks", f"{post}Transfer-Encoding: chunked\r\n\r\nZZZ\r\nabc\r\n".encode()
    yield "long header", f"GET /info/ HTTP/1.1\r\n{host}X: {'x' * 200_000}\r\n\r\n".encode()
    yield "long address", f"GET /{'x' * 200_000} HTTP/1.1\r\n{host}\r\n".encode()
    yield "many headers", f"GET /nothing HTTP/1.1\r\n{host}".encode() + b"B: c\r\n" * 5000 + b"\r\n"
    yield "hello of TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100)
    yield "zeros", bytes(1000) + b"\r\n\r\n"
    yield "no version", b"GET /\r\n\r\n"
    for line in ("BREW /info/", "TRACE /info/", "CONNECT evil.example:443", "GET /../../../etc/passwd",
                 "GET /ohif/..%2f..%2f..%2fetc/passwd", "GET /static/..%2f..%2f/etc/passwd", "GET //etc/passwd",
                 "GET http://evil.example/info/"):  # fmt: skip
        yield line, f"{line} HTTP/1.1\r\n{host}\r\n".encode()
    upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    key = "Sec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw==\r\n\r\n"
    yield "websocket", f"GET /pe/worklist HTTP/1.1\r\n{host}Origin: http://evil.example\r\n{upgrade}{key}".encode()


def _ask(world: World, method: str, path: str, **arguments: Any) -> Send:
    return lambda: world.request(method, path, **arguments)


def _post(world: World, path: str, body: str) -> Send:
    headers = {"Content-Type": "application/json"}
    return _ask(world, "POST", path, data=body.encode("utf-8", "surrogatepass"), headers=headers)


def _label(world: World, params: object, content: bytes, tag: str, name: str = "label.seg.nrrd") -> Send:
    return lambda: world.put_label(STUDIES[0], params, content, tag, name)


def _query(study: str, tag: str, label: bytes) -> dict[str, Any]:
    return {"params": {"image": study, "tag": tag}, "files": {"label": ("a.nrrd", label)}}
