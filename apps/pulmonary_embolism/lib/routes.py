"""The REST interface: what this app answers itself, beside MONAI Label's own routes that it keeps.

Every route is a plain function, so that FastAPI runs it in a thread and nothing blocks the event loop.
"""

from __future__ import annotations

import json
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Form, HTTPException, Request, Response, UploadFile
from fastapi.responses import JSONResponse
from lib.access import Caller, Role
from lib.limits import READING, RETRY_SECONDS
from lib.store import finite_json
from monailabel.endpoints import activelearning
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.async_tasks.task import AsyncTask
from monailabel.utils.async_tasks.utils import processes
from requests_toolbelt import MultipartEncoder

from pe_app.errors import InputError

router = APIRouter()

JsonText = Annotated[str, Form()]
JsonObject = Annotated[dict[str, Any] | None, Body()]


async def _caller(request: Request) -> Caller:
    """Who asks, as the guard found it."""
    caller: Caller = request.state.caller
    return caller


Who = Annotated[Caller, Depends(_caller)]


class Output(StrEnum):
    """Which part of a result a client wants."""

    ALL = "all"
    IMAGE = "image"
    JSON = "json"


# --- MONAI Label's routes, with checks


@router.get("/info/", tags=["App"])
def info(who: Who) -> dict[str, Any]:
    """What the server offers, and who the caller is to it."""
    said: dict[str, Any] = app_instance().info()
    return {**said, "pe": {**said["pe"], "reader": who.name or None, "role": who.role}}


@router.get("/auth/", tags=["Auth"])
def tokens_are_asked_for(request: Request) -> dict[str, bool]:
    """Whether MONAI Label's own clients must log in."""
    return {"enabled": request.state.tokens is not None}


@router.post("/auth/token", tags=["Auth"])
def log_in(request: Request, username: Annotated[str, Form()], password: Annotated[str, Form()]) -> dict[str, str]:
    """Name and token in the login dialog of MONAI Label's own clients, which send the token from then on."""
    found = request.state.tokens.find(password) if request.state.tokens else None
    if found is None or found.name != username:
        raise HTTPException(401, "name and token (as the password) do not belong together")
    return {"access_token": password, "token_type": "Bearer"}


@router.get("/auth/token/valid", tags=["Auth"])
def who_am_i(who: Who) -> dict[str, Any]:
    """Who the caller is, as MONAI Label's own clients ask."""
    return {"username": who.name, "roles": [who.role]}


@router.post("/activelearning/{strategy}", tags=["ActiveLearning"])
def next_study(request: Request, strategy: str, who: Who, params: JsonObject = None) -> dict[str, Any]:
    """The study to read next, held for the reader who asks."""
    said = finite_json(params or {})
    found: dict[str, Any] = activelearning.sample(strategy, {**said, "reader": who.name or said.get("reader")})
    request.state.study = found.get("id")
    return found


@router.post("/infer/{model}", tags=["Infer"])
def infer(model: str, who: Who, image: str = "", params: JsonText = "{}", output: Output = Output.ALL) -> Response:
    """Run a model on a study of the store."""
    if not image:
        raise InputError("say which study of the store: ?image=ID; uploaded images and sessions are not supported")
    said = _json(params)
    request = {name: said[name] for name in ("job", "save_label", "label_tag") if name in said}
    if request.get("save_label") and not who.role.includes(Role.ANNOTATOR):
        raise HTTPException(403, f"{who.name} has the role {who.role}, which saves no labels")
    result = app_instance().infer({**request, "model": model, "image": image})
    file = Path(result["file"])
    try:
        content = file.read_bytes()
    finally:
        file.unlink()
    if output is Output.JSON:
        return JSONResponse(result["params"])
    if output is Output.IMAGE:
        disposition = f'attachment; filename="{file.name}"'
        return Response(content, media_type="application/octet-stream", headers={"Content-Disposition": disposition})
    parts = {
        "params": (None, json.dumps(result["params"]), "application/json"),
        "image": (file.name, content, "application/octet-stream"),
    }
    form = MultipartEncoder(fields=parts)
    return Response(form.to_string(), media_type=form.content_type)


@router.put("/datastore/label", tags=["Datastore"])
def save_label(image: str, label: UploadFile, who: Who, params: JsonText = "{}", tag: str = "final") -> dict[str, Any]:
    """Save a label; with ``annotation`` in the params, a sparse annotation, whose tag the server decides."""
    info = _json(params)
    tag = tag or "final"
    app = app_instance()
    store = app.datastore()
    store.check_study(image)
    info = _attributed(info, who, store.annotation_json(image))
    with tempfile.TemporaryDirectory(prefix="pe-") as folder, READING:
        file = _uploaded(label, Path(folder), "label")
        with store.lock:  # the answer tells of this save, not of one that follows it
            label_id = store.save_label(image, str(file), tag, info)
            meaning = app.on_save_label(image, label_id)
    if "annotation" in info and info.get("reader"):
        app.leases.prolong(image, str(info["reader"]))
    return {**(meaning if "annotation" in info else {"tag": tag}), "image": image, "label": label_id}


@router.put("/datastore/", tags=["Datastore"], include_in_schema=False)
@router.put("/datastore/image", tags=["Datastore"])
def add_image(request: Request, file: UploadFile, image: str = "", params: JsonText = "{}") -> dict[str, str]:
    """Take a CT into the store under a new id."""
    info = _json(params)
    with tempfile.TemporaryDirectory(prefix="pe-") as folder, READING:
        path = _uploaded(file, Path(folder), "image")
        name = request.state.study = image or Path(file.filename or "").name.removesuffix("".join(Path(path).suffixes))
        return {"image": app_instance().datastore().add_image(name, str(path), info)}


@router.put("/datastore/image/info", tags=["Datastore"])
def update_image_info(image: str, who: Who, info: JsonText = "{}") -> dict[str, Any]:
    """Say something of a study; ``pe_label`` is positive, negative or uncertain."""
    app_instance().datastore().update_image_info(image, _attributed(_json(info), who))
    return {}


@router.put("/datastore/updatelabelinfo", tags=["Datastore"], include_in_schema=False)
@router.put("/datastore/label/info", tags=["Datastore"])
def update_label_info(label: str, tag: str, who: Who, info: JsonText = "{}", params: JsonText = "{}") -> dict[str, Any]:
    """Say something of a label, as the stock Reviewer does."""
    said = {**_json(params), **_json(info)}
    if who.name:  # the label stays its reader's
        said = {**{name: value for name, value in said.items() if name != "reader"}, "edited_by": who.name}
    app_instance().datastore().update_label_info(label, tag, said)
    return {}


@router.post("/train/{model}", tags=["Train"])
def train(model: str, params: JsonObject = None, enqueue: bool = False) -> dict[str, Any]:
    """Start a training in a process of its own, or go on with the one that was stopped."""
    task = app_instance()._trainers.get(model)
    if task is None:
        raise HTTPException(404, f"there is no training {model!r}")
    said = finite_json(params or {})
    task.settings(said)
    # nothing else: MONAI Label takes environment and import paths of the process from the request
    request = {"model": model, **{name: said[name] for name in task.config() if name in said}}
    started, _ = AsyncTask.run("train", request=request, enqueue=enqueue)
    if started is None:
        raise HTTPException(
            429,
            "a training is running: wait for it, stop it, or ask with enqueue=true",
            {"Retry-After": RETRY_SECONDS},
        )
    return dict(started)


@router.post("/batch/infer/{model}", tags=["Infer"])
def batch_infer(model: str, images: str = "all", params: JsonObject = None) -> dict[str, Any]:
    """Run a model on many studies in a process of its own; the worklist shows what it finds."""
    if model not in app_instance().info()["models"]:
        raise HTTPException(404, f"there is no model {model!r}")
    said = finite_json(params or {})
    if images not in ("all", "labeled", "unlabeled"):
        raise InputError(f"images: expected all, labeled or unlabeled, got {images!r}")
    request = {"model": model, "images": images, "max_batch_size": int(said.get("max_batch_size") or 0)}
    started, _ = AsyncTask.run("batch_infer", request=request)
    if started is None:
        raise HTTPException(429, "a batch is running: wait for it or stop it", {"Retry-After": RETRY_SECONDS})
    return dict(started)


# --- our own


@router.get("/pe/worklist", tags=["Pulmonary embolism"])
def worklist() -> dict[str, Any]:
    """Every study: how far its review is, what the served model says, who holds it."""
    app = app_instance()
    rows = app.worklist.rows()
    if any(app.store.known_facts(row["study"]) is None for row in rows):
        app.examine_new_studies()
    return {"studies": rows}


@router.get("/pe/studies/{study}", tags=["Pulmonary embolism"])
def study_details(study: str) -> dict[str, Any]:
    """One study: its schedule, the annotation that counts, the last detection of the served model."""
    return app_instance().worklist.details(study)


@router.post("/pe/studies/{study}/lease", tags=["Pulmonary embolism"])
def take_lease(study: str, who: Who, body: JsonObject = None) -> dict[str, str]:
    """Hold a study for half an hour, so that others get another one."""
    app = app_instance()
    app.datastore().check_study(study)
    return app.leases.take(study, _reader(who, body)).to_json()


@router.delete("/pe/studies/{study}/lease", tags=["Pulmonary embolism"])
def release_lease(study: str, who: Who, body: JsonObject = None) -> dict[str, Any]:
    """Let others have a study that this reader holds."""
    app = app_instance()
    app.datastore().check_study(study)
    app.leases.release(study, _reader(who, body))
    return {}


@router.get("/pe/jobs/{job}", tags=["Pulmonary embolism"])
def job_state(job: str) -> dict[str, Any]:
    """Where a detection is."""
    found = app_instance().jobs.get(job)
    if found is None:
        raise HTTPException(404, f"there is no job {job!r}")
    return vars(found)


@router.delete("/pe/jobs/{job}", tags=["Pulmonary embolism"])
def cancel_job(job: str) -> dict[str, Any]:
    """Ask a detection to stop; the request that waits for it is answered 409."""
    if not app_instance().jobs.cancel(job):
        raise HTTPException(404, f"no job {job!r} is running")
    return {}


@router.get("/pe/training", tags=["Pulmonary embolism"])
def training() -> dict[str, Any]:
    """How far both trainings are, with the figures of every epoch."""
    running = bool(processes("train"))
    stages = {name: task.stats() or None for name, task in app_instance()._trainers.items()}
    for status in stages.values():
        if status and status["state"] == "running" and not running:
            status["state"] = "stopped"  # its process was killed and could not say so
    return {**stages, "running": running}


def _reader(who: Caller, body: dict[str, Any] | None) -> str:
    """Who reads: the one who proved it, else whoever the request names."""
    return who.name or str((body or {}).get("reader") or "")


def _attributed(info: dict[str, Any], who: Caller, current: dict[str, Any] | None = None) -> dict[str, Any]:
    """What was sent, under the name that its token proves, whatever name it bears.

    Slices of the annotation that counts keep their readers: whoever goes on with a colleague's study sends them, too.
    """
    if not who.name:
        return info
    annotation = info.get("annotation")
    if isinstance(annotation, dict) and isinstance(annotation.get("slices"), list):
        known = [_review(entry) for entry in (current or {}).get("slices", ())]
        slices = [
            entry if not isinstance(entry, dict) or _review(entry) in known else {**entry, "reader": who.name}
            for entry in annotation["slices"]
        ]
        info = {**info, "annotation": {**annotation, "slices": slices}}
    return {**info, "reader": who.name}


def _review(entry: dict[str, Any]) -> list[object]:
    return [entry.get(name) for name in ("slice_index", "state", "reader", "time")]


def _json(text: str) -> dict[str, Any]:
    try:
        return finite_json(json.loads(text or "{}"))
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, InputError) else InputError(f"params: not JSON: {error}") from error


def _uploaded(upload: UploadFile, folder: Path, name: str) -> Path:
    """An upload as a file with a name of ours; of the client's name only the ending counts."""
    given = (upload.filename or "").lower()
    ending = next((end for end in (".seg.nrrd", ".nii.gz", ".nii", ".nrrd") if given.endswith(end)), "")
    if not ending:
        raise InputError(f"{name}: expected a file ending in .seg.nrrd, .nrrd, .nii.gz or .nii, got {given!a}")
    path = folder / f"{name}{ending}"
    with path.open("wb") as target:
        while block := upload.file.read(1 << 20):
            target.write(block)
    return path
