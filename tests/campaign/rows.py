"""The reliability table of MONAI Label 0.8.5, row by row: what the stock server did, what this one does now."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import requests

from campaign import corpus
from campaign.disk import sentence
from campaign.inputs import memory
from campaign.journal import Journal, annotation, annotation_content, label_content, label_file, nrrd_bytes
from campaign.world import STUDIES, Row, World, Zygote, chest, is_alive, world_of
from campaign.zygote import descendants
from pe_app.common.progress import Progress, ProgressCallback
from pe_app.ct.volume import Volume, axial_affine
from pe_app.ct.volume_io import write_volume

TRAINING = {
    "epochs": 400,
    "batch": 2,
    "matrix": 64,
    "crop": 64,
    "slab_count": 6,
    "width": 8,
    "filters": 4,
    "synthetic": True,
}
TRAINING_SECONDS = 150.0
"""For a training's process to import, begin, or notice that its server is gone."""


@dataclass(frozen=True)
class Probe:
    """One row of the table."""

    what: str
    stock: str
    ours: Callable[[World], str]
    trains: bool = False
    """Whether it waits for trainings, whose processes take long to import."""


def table(
    zygote: Zygote, measured: Mapping[str, Row], report: ProgressCallback, probes: Sequence[Probe] | None = None
) -> list[Row]:
    """Every row; those that another part measures take its figures from ``measured``."""
    rows = []
    probes = probes or (*QUICK, *LARGE)
    with world_of(zygote, "rows") as world:
        _lay_bad_images(world)
        world.start()
        for number, probe in enumerate(probes):
            report(Progress("the table of the stock server", number, len(probes), probe.what))
            row = Row("rows", probe.what, tried=1, stock=probe.stock)
            try:
                row.figures = probe.ours(world)
            except (AssertionError, KeyError, ValueError, TypeError, requests.RequestException) as error:
                row.failures.append(f"{type(error).__name__}: {error}"[:600])
                if world.wait_until_up() is None:
                    world.kill()
                    world.start()
            rows.append(row)
    for what, stock, part in ELSEWHERE:
        if part in measured:
            source = measured[part]
            failed = [f"see above: {len(source.failures)} of {source.tried}"] if source.failures else []
            rows.append(Row("rows", what, source.tried, failed, f"{source.tried} tried: {source.figures}", stock))
    return rows


ELSEWHERE = (
    (
        "radiologist saves while batch inference runs in another process",
        "27 of 60 infos lost, 2 of 60 reverted",
        "readers",
    ),
    ("8 clients save at once", "no loss; p50 0.10 s, slowest 0.26 to 1.05 s", "readers"),
    ("kill -9 during a label save", "the former label is destroyed, 0 bytes served", "every step"),
    ("kill -9 during an index write", "60 of 60 left the index empty", "random"),
    ("start with a truncated or empty index", "refuses to start", "starts"),
    ("disk full during a save", "500, good label replaced by a truncated one", "disk"),
)


def _lay_bad_images(world: World) -> None:
    whole = (world.studies / "study0.nrrd").read_bytes()
    for name, content in (("cut", whole[: len(whole) // 2]), ("nothing", b""), ("garbage", b"NRRD" + bytes(500))):
        (world.studies / f"{name}.nrrd").write_bytes(content)
    for name in ("a b", "é", "p.1.2.840", "x.nii.gz_copy"):
        (world.studies / f"{name}.nrrd").write_bytes(whole)
    victim = world.folder / "victim"
    victim.mkdir()
    (victim / "secret.nrrd").write_bytes(whole)


def _refused(answer: requests.Response, *statuses: int) -> str:
    assert answer.status_code in (statuses or range(400, 500)), f"{answer.status_code} {answer.text[:200]}"
    assert sentence(answer), answer.text[:200]
    return f'{answer.status_code} "{answer.json()["detail"][:90]}"'


def _bad_labels(world: World) -> str:
    study = STUDIES[0]
    good = label_file(world, study, [7])
    world.put_label(study, {}, good, "kept").raise_for_status()
    voxels = np.zeros(world.volume(study).shape, np.uint8)
    for label in (b"", b"garbage", nrrd_bytes(world, study, voxels[:16]), good[:200]):
        _refused(world.put_label(study, {}, label, "kept"), 422)
    shown = world.request("GET", "/datastore/label", params={"label": study, "tag": "kept"}).content
    assert label_content(shown) == label_content(good), "the former label is gone"
    return "4 of 4 refused with 422; the former label stays"


def _bad_params(world: World) -> str:
    study = STUDIES[0]
    good, other = label_file(world, study, [8]), label_file(world, study, [9])
    world.put_label(study, {}, good, "kept").raise_for_status()
    said = [_refused(world.put_label(study, text, other, "kept"), 422) for text in ("[1, 2]", "5", '"x"')]
    shown = world.request("GET", "/datastore/label", params={"label": study, "tag": "kept"}).content
    assert label_content(shown) == label_content(good), "the label was overwritten"
    return f"{said[0]}; the label stays"


def _nan_params(world: World) -> str:
    said = _refused(world.put_label(STUDIES[0], '{"p": NaN}', label_file(world, STUDIES[0], [1]), "kept"), 422)
    assert world.request("GET", "/datastore/?output=all").ok
    return f"{said}; the index stays readable"


def _bad_images(world: World) -> str:
    latest = time.monotonic() + 30
    while time.monotonic() < latest:  # examined in the background
        rows = {row["study"]: row for row in world.request("GET", "/pe/worklist").json()["studies"]}
        if all(row["reason"] != "not examined yet" for row in rows.values()):
            break
        time.sleep(0.2)
    for name in ("cut", "nothing", "garbage"):
        assert not rows[name]["usable"], rows[name]
        assert len(rows[name]["reason"]) > 10, rows[name]
        _refused(world.request("POST", "/infer/detection", params={"image": name}), 422)
    served = {
        world.request("POST", "/activelearning/next_unreviewed", json={"reader": f"r{k}"}).json().get("id")
        for k in range(20)
    }
    assert not served & {"cut", "nothing", "garbage"}, served
    for k in range(20):
        for study in served - {None}:
            world.request("DELETE", f"/pe/studies/{study}/lease", json={"reader": f"r{k}"})
    return f'listed as unusable ("{rows["cut"]["reason"][:60]}..."), never served, infer 422'


def _next_twice(world: World) -> str:
    for strategy in ("next_unreviewed", "random", "most_uncertain", "disagreement"):
        for _ in range(2):
            answer = world.request("POST", f"/activelearning/{strategy}", json={"reader": "twice"})
            assert answer.ok, f"{strategy}: {answer.status_code} {answer.text[:200]}"
    while True:  # hold all but one
        answer = world.request("POST", "/activelearning/random", json={"reader": str(time.monotonic_ns())})
        if not answer.json():
            break
    codes = [world.request("POST", "/activelearning/random", json={"reader": f"late{k}"}).status_code for k in range(3)]
    assert codes == [200] * 3, codes
    world.kill()
    (world.studies / ".pe" / "leases.json").unlink(missing_ok=True)
    world.start()
    return "200 each time; {} when none is left"


def _two_readers(world: World) -> str:
    found: list[str] = []

    def ask(number: int) -> None:
        found.append(
            world.request("POST", "/activelearning/next_unreviewed", json={"reader": f"reader{number}"}).json()["id"]
        )

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == len(set(found)) == 6, found
    return "6 readers at once got 6 different studies"


def _conflict(world: World) -> str:
    study = STUDIES[5]
    slices = world.schedule(study)
    saved = []
    for number in range(2):
        params, label = annotation(
            world, study, slices[: number + 1], f"reader{number}", "00", np.random.default_rng(number)
        )
        saved.append((world.put_label(study, {**params, "based_on": None}, label), params, label))
    (first, params, label), (second, _, _) = saved
    assert first.ok, first.text
    assert second.status_code == 409, second.text
    assert second.json()["annotation"]["slices"] == params["annotation"]["slices"], second.text
    shown = Journal(world).shown("annotation", study)
    assert shown == annotation_content(params["annotation"]["slices"], label), shown
    return "409 with what counts; the first save stays"


def _history(world: World) -> str:
    study = STUDIES[7]
    slices = world.schedule(study)
    contents = []
    for count in (1, 2, 3):
        params, label = annotation(world, study, slices[:count], f"reader{count}", "00", np.random.default_rng(count))
        world.put_label(study, params, label).raise_for_status()
        contents.append(annotation_content(params["annotation"]["slices"], label))
    versions = world.request("GET", f"/pe/studies/{study}/history").json()["versions"]
    assert len(versions) == 3, versions
    oldest = versions[-1]["revision"]
    label = world.request("GET", f"/pe/studies/{study}/history/{oldest}/label").content
    entry = world.request("GET", f"/pe/studies/{study}/history/{oldest}").json()
    assert annotation_content(entry["annotation"]["slices"], label) == contents[0], entry
    world.request("POST", f"/pe/studies/{study}/history/{oldest}/restore", json={}).raise_for_status()
    assert Journal(world).shown("annotation", study) == contents[0]
    assert len(world.request("GET", f"/pe/studies/{study}/history").json()["versions"]) == 4
    return "every save listed, fetched and restored through REST"


def _ids(world: World) -> str:
    listed = {row["study"] for row in world.request("GET", "/pe/worklist").json()["studies"]}
    assert {"a b", "é", "p.1.2.840", "x.nii.gz_copy"} <= listed, listed
    for study in ("a b", "é", "x.nii.gz_copy"):
        answer = world.request("GET", "/datastore/image", params={"image": study})
        assert answer.content == (world.studies / f"{study}.nrrd").read_bytes(), study
    return "all four listed and served"


def _outside(world: World) -> set[str]:
    return {
        str(path)
        for path in [*world.folder.rglob("*"), *Path("/elsewhere").glob("*")]
        if not path.is_relative_to(world.studies)
    }


def _tags(world: World) -> str:
    before, label = _outside(world), label_file(world, STUDIES[0], [1])
    for tag in ("/elsewhere", "../../victim", "..", "a/b"):
        _refused(world.put_label(STUDIES[0], {}, label, tag), 422)
        said = {"params": json.dumps({"save_label": True, "label_tag": tag})}
        _refused(world.request("POST", "/infer/candidates", params={"image": STUDIES[0]}, data=said))
    assert _outside(world) == before
    return "8 of 8 refused; nothing outside of the store"


def _upload_paths(world: World) -> str:
    before, ct = _outside(world), (world.studies / "study0.nrrd").read_bytes()
    for image, name in (
        ("../victim/evil", "x.py"),
        ("/tmp/abs", "x.sh"),
        ("../victim/evil", "x.nrrd"),
        ("fine", "x.py"),
    ):
        _refused(world.request("PUT", "/datastore/image", params={"image": image}, files={"file": (name, ct)}), 422)
    assert _outside(world) == before
    return "4 of 4 refused with 422"


def _session(world: World) -> str:
    before = _outside(world)
    for _, content in corpus.archives():
        _refused(world.request("PUT", "/session/?uncompress=true", files={"files": ("a.tar", content)}))
    assert _outside(world) == before
    return "sessions are not served: 4xx, nothing written"


def _other_files(world: World) -> str:
    secret = str(world.folder / "victim" / "secret.nrrd")
    _refused(world.request("POST", "/infer/detection", params={"image": secret}), 404)
    said = {"params": json.dumps({"image": secret, "model": "candidates"})}
    answer = world.request("POST", "/infer/detection?output=json", params={"image": STUDIES[0]}, data=said)
    assert answer.ok, answer.text[:200]
    assert answer.json()["schema"].startswith("pe-detection"), answer.text[:200]
    return "404; an override in params is ignored"


def _existing_image(world: World) -> str:
    before = (world.studies / "study0.nrrd").read_bytes()
    other = (world.studies / "study1.nrrd").read_bytes()
    said = _refused(world.request("PUT", "/datastore/image?image=study0", files={"file": ("x.nrrd", other)}), 409)
    assert (world.studies / "study0.nrrd").read_bytes() == before
    return said


def _model(world: World) -> str:
    served = world.request("GET", "/info/").json()["pe"]["model"]["sha256"]
    for _, content in corpus.weights((world.folder / "model.safetensors").read_bytes()):
        _refused(world.request("PUT", "/model/detection", files={"file": ("model.pt", content)}))
    assert world.request("GET", "/info/").json()["pe"]["model"]["sha256"] == served
    return "no route takes weights: 4xx; the served model stays"


def _threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def _reload(world: World) -> str:
    for _ in range(10):
        world.request("GET", "/info/")
    before = _threads(world.pid)
    for _ in range(5):
        _refused(world.request("POST", "/reload"))
    after = _threads(world.pid)
    assert after <= before + 2, (before, after)
    return f"4xx; threads {before}, then {after}"


def _temporary(world: World) -> str:
    for _ in range(5):
        world.put_label(STUDIES[0], {}, b"garbage", "kept")
        world.request("PUT", "/datastore/image?image=new", files={"file": ("x.nrrd", b"garbage")})
        world.request("POST", "/infer/candidates", params={"image": STUDIES[0]})
        world.request("POST", "/infer/candidates", params={"image": "cut"})
    latest = time.monotonic() + 5
    while (left := world.temporary()) and time.monotonic() < latest:
        time.sleep(0.05)
    assert not left, left
    return "0 files after 15 failed and 5 good requests"


def _status(world: World) -> dict[str, object]:
    return world.request("GET", "/pe/training").json()


def _until(what: str, true: Callable[[], object], seconds: float = TRAINING_SECONDS) -> float:
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < seconds, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.1)
    return time.monotonic() - begun


def _until_epoch(world: World, epoch: int) -> None:
    """Wait until a running training has finished an epoch."""

    def there() -> bool:
        status = _status(world)
        last = status["tasks"][-1]
        assert last["status"] in ("SUBMITTED", "RUNNING"), f"the training ended: {last}"
        return (
            bool(status["encoder"]) and status["encoder"]["state"] == "running" and status["encoder"]["epoch"] >= epoch
        )

    _until(f"epoch {epoch}", there)


def _stop_training(world: World) -> None:
    world.request("DELETE", "/train/")
    _until("the training stops", lambda: not _status(world)["running"])


def _training_dies(world: World) -> str:
    for number, study in enumerate(STUDIES):
        said = {"info": json.dumps({"pe_label": "positive" if number % 2 else "negative"})}
        world.request("PUT", "/datastore/image/info", params={"image": study}, data=said)
        if number % 2:
            params, label = annotation(world, study, world.schedule(study), "ann", "00", np.random.default_rng(number))
            world.put_label(study, params, label).raise_for_status()
    said = []
    for name, how in (("SIGKILL", signal.SIGKILL), ("SIGTERM", signal.SIGTERM)):
        world.request("POST", "/train/encoder", json=TRAINING).raise_for_status()
        _until_epoch(world, 1)
        epoch = _status(world)["encoder"]["epoch"]
        children = descendants(world.pid)
        assert children, "the training has no process of its own"
        os.kill(world.pid, how)
        code = world.ended(40)
        assert code is not None, f"the server does not end after {name}"
        gone = _until(f"the training ends after {name}", lambda pids=children: not any(map(is_alive, pids)), 60)
        world.start()
        assert not _status(world)["running"], _status(world)
        after = _status(world)["encoder"]["epoch"]
        assert after >= epoch, (epoch, after)
        said.append(f"{name}: ended within {gone:.1f} s at epoch {after}")
    tasks = _status(world)["tasks"]
    world.request("POST", "/train/encoder", json=TRAINING).raise_for_status()
    _until_epoch(world, after + 1)
    goes_on = _status(world)["encoder"]["epoch"]
    assert len(_status(world)["tasks"]) >= len(tasks) >= 2, tasks
    _stop_training(world)
    return "; ".join(said) + f"; goes on at epoch {goes_on}"


def _two_trainings(world: World) -> str:
    answers = [world.request("POST", "/train/encoder", json=TRAINING) for _ in range(2)]
    codes = [answer.status_code for answer in answers]
    assert 429 in codes, codes
    _refused(answers[codes.index(429)], 429)
    _until("the training runs", lambda: _status(world)["running"])
    _stop_training(world)
    return f"{' and '.join(map(str, codes))} while one runs"


def _unknown_trainer(world: World) -> str:
    return _refused(world.request("POST", "/train/nothing", json={}), 404)


def _task_history(world: World) -> str:
    before = _status(world)["tasks"]
    world.kill()
    world.start()
    after = _status(world)["tasks"]
    assert len(after) == len(before) >= 1, (before, after)
    return f"{len(after)} tasks before and after"


def _large(world: World) -> str:
    """A CT of 512 x 512 x 400 as .nii.gz, the full-size networks' slabs, and everybody else meanwhile."""
    world.kill()
    with world_of(world.zygote, "large") as big:
        assert world.zygote.call("campaign.rows", "make_large", str(big.folder), seconds=300) == 0
        size = (big.studies / "large.nii.gz").stat().st_size / 1e6
        big.start()
        before = memory(big.pid)
        waits: list[float] = []
        done = threading.Event()

        def ask() -> None:
            while not done.wait(0.1):
                begun = time.monotonic()
                assert big.request("GET", "/info/").ok
                waits.append(time.monotonic() - begun)

        asking = threading.Thread(target=ask)
        asking.start()
        begun = time.monotonic()
        answer = big.request("POST", "/infer/detection", params={"image": "large"}, timeout=400)
        seconds = time.monotonic() - begun
        done.set()
        asking.join(60)
        assert answer.ok, answer.text[:200]
        peak = memory(big.pid)
        label = np.zeros((400, 512, 512), np.int16)
        label[200, 100:120, 100:120] = 1
        header = nrrd_bytes(big, "study0", np.zeros((1, 1, 1), np.uint8)).split(b"\n\n")[0].decode()
        header = header.replace("uint8", "int16").replace("gzip", "raw").replace("sizes: 1 1 1", "sizes: 512 512 400")
        header = header.replace("5.0", "0.75", 2).replace("5.0", "1.0")
        volume = axial_affine((1.0, 0.75, 0.75))[:3, 3]
        lines = [line if not line.startswith("space") or "left" in line else "" for line in header.split("\n")]
        header = "\n".join(line for line in lines if line)
        header += "\nspace directions: (0.75,0,0) (0,0.75,0) (0,0,1.0)\nspace origin: ({},{},{})\n\n".format(*volume)
        begun = time.monotonic()
        saved = big.put_label("large", {}, header.encode() + label.tobytes(), "second", "label.nrrd")
        put = time.monotonic() - begun
        assert saved.ok, saved.text[:200]
        begun = time.monotonic()
        got = big.request("GET", "/datastore/label", params={"label": "large", "tag": "second"}, timeout=120)
        get = time.monotonic() - begun
        assert len(got.content) > 0
        slowest = max(waits)
        assert slowest < 2.0, f"/info/ waited {slowest:.1f} s"
    world.start()
    return (
        f"infer of {size:.0f} MB {seconds:.0f} s, /info/ meanwhile p50 {1000 * np.median(waits):.0f} ms, slowest "
        f"{slowest:.2f} s; memory {before:.0f} to {peak:.0f} MiB; PUT 210 MB label {put:.1f} s, GET {get:.1f} s"
    )


def make_large(folder: str) -> None:
    """The large CT, and a model with slabs of 384 x 384; run in a fork."""
    from pe_app.ct.slabs import SlabConfig
    from pe_app.model.detector import Detector
    from pe_app.model.slab_encoder import EncoderConfig
    from pe_app.model.study_classifier import ClassifierConfig

    small = chest(0).voxels
    hu = np.repeat(np.repeat(np.repeat(small, 13, 0)[:400], 8, 1), 8, 2)
    hu += np.random.default_rng(1).integers(-20, 20, hu.shape, np.int16)
    write_volume(Volume(hu, axial_affine((1.0, 0.75, 0.75)), "large"), Path(folder) / "studies" / "large.nii.gz")
    slabs = SlabConfig()
    network = ClassifierConfig(feature_channels=96, grid=slabs.grid, filters=4)
    Detector.untrained(0, slabs, EncoderConfig(width=12), network).save(Path(folder) / "model.safetensors")


QUICK = (
    Probe("garbage, empty, cut, wrong-geometry label", "accepted, 200", _bad_labels),
    Probe("label params that are no object", "500, but the label file was overwritten", _bad_params),
    Probe("label params with NaN", "200, then GET /datastore/ is 500 for everybody", _nan_params),
    Probe("truncated, empty, garbage images", "listed, served by active learning; infer 500", _bad_images),
    Probe("same strategy twice at once, one image left", "500", _next_twice),
    Probe("two readers ask for the next sample", "may get the same; last writer wins", _two_readers),
    Probe("two readers save the same study", "last writer wins, the other is gone", _conflict),
    Probe("versions of a label", "none: overwritten in place", _history),
    Probe("unusual image ids", "x.nii.gz_copy is never listed", _ids),
    Probe("tag=/elsewhere, ../../victim, also as label_tag", "written outside of the store", _tags),
    Probe("PUT image=../victim/evil, file x.py", "any path and extension is written", _upload_paths),
    Probe("PUT /session/ with a tar of ../ and absolute names", "written outside", _session),
    Probe("infer image=/any/path, override in params", "read; overridden", _other_files),
    Probe("PUT of an existing image id", "study silently overwritten", _existing_image),
    Probe("PUT /model with a pickle", "weights replaced unvalidated", _model),
    Probe("POST /reload five times", "unauthenticated, threads 13 to 28", _reload),
    Probe("failed requests", "each leaves its upload in the temporary folder", _temporary),
    Probe(
        "kill -9 or SIGTERM of the server during a training",
        "the child trains on as an orphan; no resume",
        _training_dies,
        trains=True,
    ),
    Probe("two POST /train back to back", "both 200, the second queued silently", _two_trainings, trains=True),
    Probe("unknown trainer", "200 SUBMITTED, fails 15 s later", _unknown_trainer),
    Probe("restart", "all task history lost", _task_history, trains=True),
)
LARGE = (
    Probe("infer 512 x 512 x 400 (.nii.gz), /info/ meanwhile; 175 MB label",
          "69 s, everything frozen (5.7 s in a 6 s inference), 4.5 GB; PUT 2.8 s, GET 1.5 s", _large),
)  # fmt: skip
