"""A real Orthanc with its DICOMweb plugin on a free loopback port, with a database that lives as long as the test."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from app_server import free_port

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
USER, PASSWORD = "reader", "let me in"


class Orthanc:
    """A running archive: ``url`` is its DICOMweb root."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        port = free_port()
        self._address = f"http://127.0.0.1:{port}"
        self.url = f"{self._address}/dicom-web"
        configuration = {
            "StorageDirectory": str(folder / "storage"),
            "IndexDirectory": str(folder / "storage"),
            "HttpPort": port,
            "DicomServerEnabled": False,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": True,
            "RegisteredUsers": {USER: PASSWORD},
            "HttpThreadsCount": 8,
            "Plugins": [str(PLUGIN)],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        }
        (folder / "orthanc.json").write_text(json.dumps(configuration))
        self.start()

    def start(self) -> None:
        log = (self._folder / "orthanc.log").open("ab")
        environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        command = ["Orthanc", str(self._folder / "orthanc.json")]
        self.process = subprocess.Popen(command, cwd=self._folder, env=environment, stdout=log, stderr=log)
        log.close()
        for _ in range(200):
            if self.process.poll() is not None:
                break
            try:
                self.rest("GET", "/system")
                return
            except requests.ConnectionError:
                time.sleep(0.1)
        raise RuntimeError(f"Orthanc did not start:\n{(self._folder / 'orthanc.log').read_text()[-2000:]}")

    def rest(self, method: str, path: str, **arguments) -> requests.Response:
        """Orthanc's own interface, not DICOMweb: the tests' independent view of the archive."""
        answer = requests.request(method, self._address + path, auth=(USER, PASSWORD), timeout=30, **arguments)
        answer.raise_for_status()
        return answer

    def add(self, files: Sequence[Path]) -> None:
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            for number, file in enumerate(files):
                archive.write(file, str(number))
        self.rest("POST", "/instances", data=content.getvalue())

    def instances(self) -> dict[str, bytes]:
        """SOP Instance UID and file of all that the archive holds."""
        found = {}
        for instance in self.rest("GET", "/instances?expand").json():
            uid = instance["MainDicomTags"]["SOPInstanceUID"]
            found[uid] = self.rest("GET", f"/instances/{instance['ID']}/file").content
        return found

    def delete_study(self, uid: str) -> None:
        for study in self.rest("GET", "/studies?expand").json():
            if study["MainDicomTags"]["StudyInstanceUID"] == uid:
                self.rest("DELETE", f"/studies/{study['ID']}")

    def empty(self) -> None:
        """Running and empty, as at first."""
        if self.process.poll() is not None:
            self.start()
        for study in self.rest("GET", "/studies").json():
            self.rest("DELETE", f"/studies/{study}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait(5)


@contextmanager
def running_orthanc(folder: Path) -> Iterator[Orthanc]:
    """Skips the test with a reason where Orthanc is missing."""
    if shutil.which("Orthanc") is None or not PLUGIN.is_file():
        pytest.skip("no archive to test with: install the Debian packages orthanc and orthanc-dicomweb")
    folder.mkdir(parents=True, exist_ok=True)
    orthanc = Orthanc(folder)
    try:
        yield orthanc
    finally:
        orthanc.stop()
