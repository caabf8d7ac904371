"""Bad inputs sent to the reader of volumes and to the server: each is refused in words, and nothing else happens."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path

import numpy as np
import requests

from campaign import attacks, corpus
from campaign.attacks import REFUSED, Send
from campaign.disk import sentence
from campaign.journal import annotation
from campaign.world import STUDIES, Row, World, Zygote, chest, template, world_of
from pe_app.common.progress import Progress, ProgressCallback

READ_SECONDS, READ_MIB = 20.0, 1024
"""What a refusal of a file may take at most."""
BOMB_SECONDS, BOMB_MIB = 120.0, 4.5 * 1024
"""The same for a file of 2 GiB of voxels, which is as large as its header says."""


class Watch:
    """Sends bad requests and looks at what they did beside their answer."""

    def __init__(self, world: World, row: Row, report: ProgressCallback) -> None:
        self.world = world
        self.row = row
        self.report = report
        self.before = self._outside()

    def send(self, name: str, send: Send, allowed: Sequence[int] = REFUSED) -> None:
        """One bad request."""
        self.report(Progress("bad inputs", self.row.tried, 0, f"{self.row.what}: {name[:60]}"))
        self.row.tried += 1
        try:
            answer = send()
        except requests.RequestException as error:
            self._failed(name, f"no answer: {error}")
            if self.world.wait_until_up() is None:
                self.world.kill()
                self.world.start()
            return
        if answer.status_code not in allowed:
            self._failed(name, f"{answer.status_code} {answer.text[:150]!a}")
        elif answer.status_code >= 400 and answer.request.method != "HEAD" and not sentence(answer):
            self._failed(name, f"{answer.status_code} without a sentence: {answer.text[:150]!a}")
        if "Traceback" in answer.text or "site-packages" in answer.text:
            self._failed(name, f"shows the inside of the program: {answer.text[:150]!a}")
        self.look(name)

    def look(self, name: str) -> None:
        """Whether anything outside the store changed or a temporary file stayed."""
        if (now := self._outside()) != self.before:
            self._failed(name, f"outside of the store: {sorted(now ^ self.before)[:3]}")
            self.before = now
        latest = time.monotonic() + 2
        while (left := self.world.temporary()) and time.monotonic() < latest:
            time.sleep(0.01)
        if left:
            self._failed(name, f"left in the temporary folder: {left[:3]}")
            for file in left:
                Path(file).unlink(missing_ok=True)

    def _outside(self) -> set[tuple[str, int, int]]:
        """Files beside the studies folder, and the traps in /tmp."""
        found = set()
        for folder in (self.world.folder, Path("/tmp")):
            for entry in os.scandir(folder):
                if folder == Path("/tmp") and not entry.name.startswith("pe-campaign-was-here"):
                    continue
                if entry.name == "studies":
                    continue
                paths = [Path(entry.path), *Path(entry.path).rglob("*")] if entry.is_dir() else [Path(entry.path)]
                found |= {(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths}
        return found

    def _failed(self, name: str, why: str) -> None:
        self.row.failures.append(f"{name[:80]!a}: {why}")


def bad_inputs(zygote: Zygote, seed: int, share: float, report: ProgressCallback) -> list[Row]:
    """The corpus; ``share`` of it for a quick look."""
    every = max(1, round(1 / share))  # every n-th input
    rows = []
    with world_of(zygote, "inputs") as world:
        victim = world.folder / "victim"
        victim.mkdir()
        (victim / "secret.nrrd").write_bytes((world.studies / "study0.nrrd").read_bytes())
        (world.studies / "link.nrrd").symlink_to(victim / "secret.nrrd")
        world.start()
        params, label = annotation(world, STUDIES[1], world.schedule(STUDIES[1]), "ann", "00", np.random.default_rng(1))
        world.put_label(STUDIES[1], params, label).raise_for_status()
        before = memory(world.pid)
        groups = (
            ("volumes as new CTs and as labels", attacks.volumes),
            ("labels, params, annotations", attacks.saves),
            ("ids, tags and names that are paths", attacks.names),
            ("JSON bodies, settings", attacks.bodies),
            ("archives", attacks.archives),
            ("weights sent to the server", attacks.weights),
        )
        for what, make in groups:
            row = Row("inputs", what)
            watch = Watch(world, row, report)
            for name, send, allowed in islice(make(world), 0, None, every):
                watch.send(name, send, allowed)
            row.check(world.request("GET", "/info/").ok, "the server does not answer any more")
            rows.append(row)
        row = Row("inputs", "headers and broken HTTP")
        watch = Watch(world, row, report)
        for name, content in islice(attacks.raw(world), 0, None, every):
            _send_raw(watch, name, content)
        rows.append(row)
        rows[-1].figures = f"server's memory grew by {memory(world.pid) - before:.0f} MiB (peak, over all groups)"
        saved = world.request("GET", f"/pe/studies/{STUDIES[1]}").json()["annotation"]
        row.check(saved["slices"] == params["annotation"]["slices"], "the annotation saved before is another now")
        if "Traceback" in world.log.read_text(errors="replace"):
            text = world.log.read_text(errors="replace")
            tracebacks = text.count("Traceback (most recent call last)")
            row.figures += f"; {tracebacks} tracebacks in the server's log"
    return rows


def read_bad_files(zygote: Zygote, every: int, report: ProgressCallback) -> Row:
    """Bad volumes, DICOM folders and weights through the program's readers, each in a process of its own."""
    row = Row("inputs", "volumes and DICOM folders through read_volume, weights through Detector.load")
    folder = zygote.work / "bad-files"
    out = zygote.work / "bad-files.json"
    folder.mkdir()
    template(zygote)
    report(Progress("bad inputs", 0, 0, row.what))
    zygote.call("campaign.inputs", "read_each", str(folder), every, str(out), seconds=600)
    results = json.loads(out.read_text())
    for name, (outcome, text, seconds, mib) in results.items():
        if row.check(outcome in ("refused", "read right"), f"{name}: {outcome} {text}"):
            large = "as large as it says" in name
            right = seconds < (BOMB_SECONDS if large else READ_SECONDS) and mib < (BOMB_MIB if large else READ_MIB)
            row.check(right, f"{name}: took {seconds:.0f} s and {mib:.0f} MiB")
    slowest = max(results, key=lambda name: results[name][2])
    largest = max(results, key=lambda name: results[name][3])
    row.tried = len(results)
    row.figures = (
        f"slowest {results[slowest][2]:.1f} s ({slowest}); most memory {results[largest][3]:.0f} MiB ({largest})"
    )
    subprocess.run(["rm", "-rf", str(folder)], check=False)
    return row


def read_each(folder: str, every: int, out: str) -> None:
    """Make every bad file and read it; runs in a fork, and each reading in a fork of that."""
    results = {}
    files = Path(folder, "files")
    files.mkdir()

    def made() -> Iterator[Path]:
        model = Path(folder).parent / "template" / "model.safetensors"
        weights = ((f"{name}.safetensors", content) for name, content in corpus.weights(model.read_bytes()))
        for number, (name, content) in enumerate(islice(chain(corpus.volumes(), weights), 0, None, every)):
            path = files / f"{number}" / name.replace("/", "|")[-120:].replace("\x00", "0")
            path.parent.mkdir()
            path.write_bytes(content)
            yield path
        dicom = Path(folder, "dicom")
        dicom.mkdir()
        yield from islice(corpus.dicom_folders(dicom), 0, None, every)

    for path in made():
        results[path.name] = _outcome(path, Path(folder) / "result.json")
        Path(out).write_text(json.dumps(results))


def _outcome(path: Path, result: Path) -> tuple[str, str, float, float]:
    result.unlink(missing_ok=True)
    begun = time.monotonic()
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        _read(path, result)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if not result.is_file():
        return "died", f"status {status}", time.monotonic() - begun, 0.0
    outcome, text, mib = json.loads(result.read_text())
    return outcome, text, time.monotonic() - begun, mib


def _read(path: Path, result: Path) -> None:
    from pe_app.common.errors import InputError
    from pe_app.ct.volume_io import read_volume
    from pe_app.model.detector import Detector

    before = memory(os.getpid())
    try:
        if path.suffix == ".safetensors":
            text = Detector.load(path).sha256
            result.write_text(json.dumps(["loaded", text, 0.0]))
            return
        volume = read_volume(path)
        hu = chest(0).voxels
        # a lie that changes nothing: the very voxels of the CT behind it, at their place
        same = any(np.array_equal(volume.voxels, whole) for whole in (hu, hu[4:12])) and volume.spacing_mm[0] == 5
        outcome, text = ("read right" if same else "read"), f"{volume.shape} {volume.spacing_mm} {volume.affine[:3, 3]}"
    except InputError as error:
        outcome, text = ("refused" if len(str(error)) > 10 else "no sentence"), str(error)
    except BaseException as error:
        outcome, text = "raised", f"{type(error).__name__}: {error}"
    result.write_text(json.dumps([outcome, text[:300], memory(os.getpid()) - before]))


def memory(pid: int) -> float:
    """The most memory that a process has had, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _send_raw(watch: Watch, name: str, content: bytes) -> None:
    """Bytes over a connection; refused means 4xx, or the connection closed without an answer."""
    watch.row.tried += 1
    watch.report(Progress("bad inputs", watch.row.tried, 0, f"{watch.row.what}: {name[:60]}"))
    answer = b""
    with socket.create_connection(("127.0.0.1", watch.world.port), timeout=10) as connection:
        try:
            connection.sendall(content)
            with suppress(OSError):  # the server may have closed it already: its answer can still be read
                connection.shutdown(socket.SHUT_WR)
            while block := connection.recv(65536):
                answer += block
        except (TimeoutError, ConnectionError) as error:
            if isinstance(error, TimeoutError):
                watch.row.failures.append(f"{name}: no answer within 10 s")
    status = answer.split(b" ", 2)[1:2]
    if status and not 400 <= int(status[0]) < 500:
        watch.row.failures.append(f"{name}: {answer[:150]!a}")
    if b"Traceback" in answer or b"root:" in answer:
        watch.row.failures.append(f"{name}: shows the inside: {answer[:150]!a}")
    watch.look(name)


def fuzz_volumes(zygote: Zygote, seed: int, examples: int, report: ProgressCallback) -> Row:
    """Hypothesis changes bytes and header words of good files; ``read_volume`` reads or refuses in words."""
    row = Row("inputs", "hypothesis: changed bytes of good files through read_volume")
    report(Progress("bad inputs", 0, examples, row.what))
    out = zygote.work / "fuzz.json"
    code = zygote.call("campaign.fuzz", "volumes", str(zygote.work), seed, examples, str(out), seconds=600)
    result = json.loads(out.read_text()) if out.is_file() else {"tried": 0, "failure": f"ended with {code}"}
    row.tried, row.figures = result["tried"], f"seed {seed}; {result.get('read', 0)} read, the others refused"
    row.failures = [result["failure"]] if result.get("failure") else []
    return row


def fuzz_server(zygote: Zygote, seed: int, examples: int, report: ProgressCallback) -> list[Row]:
    """Hypothesis and schemathesis against every route; no answer is 5xx, none shows the inside of the program."""
    from campaign import fuzz

    rows = []
    with world_of(zygote, "fuzz") as world:
        world.start()
        row = Row("inputs", "hypothesis: JSON and words against the REST interface", figures=f"seed {seed}")
        report(Progress("bad inputs", 0, examples, row.what))
        watch = Watch(world, row, report)
        row.failures += fuzz.requests_to(world, seed, examples, row)
        watch.look("hypothesis")
        row.check(world.request("GET", "/info/").ok, "the server does not answer any more")
        rows.append(row)

        row = Row("inputs", "schemathesis: every route of the OpenAPI description")
        report(Progress("bad inputs", 0, examples, row.what))
        row.tried, failures, row.figures = fuzz.schemathesis(world, seed, max(2, examples // 10))
        row.failures += failures
        watch = Watch(world, row, report)
        watch.look("schemathesis")
        row.check(world.request("GET", "/info/").ok, "the server does not answer any more")
        rows.append(row)
    return rows
