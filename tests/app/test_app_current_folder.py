"""A server works in whatever folder it is started, also where modules lie that are named like its own."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from annotated_store import SETTINGS, annotated_store
from app_server import APP, free_port, hostile_folder


def pe_app_serve(studies, port, model):
    return [Path(sys.executable).with_name("pe-app"), "serve", studies, "--port", str(port), "--model", model]


def monailabel_start_server(studies, port, model):
    place = ["--app", APP, "--studies", studies, "--host", "127.0.0.1", "--port", str(port)]
    ours = ["--uvicorn_app", "pe_monailabel.server.serving:app", "--conf", "model", model]
    return [sys.executable, "-P", "-m", "monailabel.main", "start_server", *place, *ours]


def answer(process, address, path, method="GET", seconds=120, **arguments):
    deadline = time.monotonic() + seconds
    while True:
        try:
            return requests.request(method, address + path, timeout=30, **arguments).json()
        except requests.ConnectionError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)


def ended(process, address, path, seconds=300):
    deadline = time.monotonic() + seconds
    while True:
        task = answer(process, address, path)
        if task["status"] not in ("SUBMITTED", "RUNNING"):
            return task
        assert time.monotonic() < deadline, task
        time.sleep(0.2)


@pytest.mark.parametrize("command", [pe_app_serve, monailabel_start_server])
def test_a_server_trains_and_detects_in_a_folder_with_modules_named_like_its_own(command, tmp_path):
    store = annotated_store(tmp_path)
    current = hostile_folder(tmp_path / "current")
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MONAI_LABEL_APP_DIR": str(tmp_path)}
    arguments = list(map(str, command(store.root, port, tmp_path / "start.safetensors")))
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(arguments, cwd=current, env=environment, stdout=log, stderr=log)
    try:
        answer(process, address, "/info/")
        answer(process, address, "/train/encoder", "POST", json={**SETTINGS, "epochs": 1})
        training = ended(process, address, "/train/")
        answer(process, address, "/batch/infer/candidates", "POST", json={"max_batch_size": 1})
        batch = ended(process, address, "/batch/infer")
    finally:
        process.terminate()
        process.wait(30)
    assert (training["status"], batch["status"]) == ("DONE", "DONE"), (training, batch)
    assert not (current / "executed").exists()
