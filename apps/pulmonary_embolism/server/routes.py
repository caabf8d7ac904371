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
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.async_tasks.task import AsyncTask
from requests_toolbelt import MultipartEncoder

from pe_app.common.errors import InputError
from pe_monailabel.server import page
from pe_monailabel.server.access import Caller, Role
from pe_monailabel.server.blinding import STRATEGIES as BLIND_STRATEGIES
from pe_monailabel.server.blinding import Blinded
from pe_monailabel.server.forms import BoundedRoute
from pe_monailabel.server.limits import READING, RETRY_SECONDS
from pe_monailabel.server.permissions import LONGEST
from pe_monailabel.store.checks import finite_json, printable, split_ending

router = APIRouter(route_class=BoundedRoute)

JsonText = Annotated[str, Form()]
JsonObject = Annotated[dict[str, Any] | None, Body()]


async def _caller(request: Request) -> Caller:
    """Who asks, as the guard found it."""
    caller: Caller = request.state.caller
    return caller


Who = Annotated[Caller, Depends(_caller)]


def not_blind(request: Request, who: Who, image: str = "", label: str = "", reader: str = "") -> None:
    """Before MONAI Label's own routes that tell of labels, where the server reads blinded."""
    app_instance().blinding.check_stock(request.url.path, image or label, who, who.name or reader)


class Output(StrEnum):
    """Which part of a result a client wants."""

    ALL = "all"
    IMAGE = "image"
    JSON = "json"


# --- MONAI Label's routes, with checks


@router.get("/", tags=["App"], response_class=HTMLResponse)
def front_page(request: Request, who: Who) -> Response:
    """The worklist for a browser, and for programs what is served; of the studies nothing without a token."""
    app = app_instance()
    open_to_all = request.state.tokens is None
    if "text/html" not in request.headers.get("accept", ""):
        served = {"name": app.name, "version": app.version, "tokens": not open_to_all, "openapi": "/openapi.json"}
        return JSONResponse(served)
    if not open_to_all and not who.name:
        return HTMLResponse(page.door_page(), headers=page.HEADERS)
    app.examine_new_studies()
    model = app.detections.model
    rows = [app.blinding.row(row, who, who.name) for row in app.worklist.rows()]
    return HTMLResponse(page.worklist_page(rows, f"{model.name} {model.version}"), headers=page.HEADERS)


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
    """The study to read next, held for the reader who asks; ``work`` is slices or labels, ``skip`` names studies."""
    said = finite_json(params or {})
    app = app_instance()
    if app.blinding.on:
        return _next_blinded(request, strategy, who, said)
    found: dict[str, Any] = app.next_sample({**said, "strategy": strategy, "reader": who.name or said.get("reader")})
    if not found:
        return {}
    request.state.study = found["id"]
    return {**app.store.get_image_info(found["id"]), **found}


def _next_blinded(request: Request, strategy: str, who: Caller, said: dict[str, Any]) -> dict[str, Any]:
    """The next study that no other reader has begun; of its slices only the schedule."""
    app = app_instance()
    if strategy not in BLIND_STRATEGIES:
        raise Blinded(f"{strategy}: this server reads blinded, and that order tells what the model found")
    reader = _reader(who, said)
    begun = [study for study in app.store.entries() if app.blinding.begun_by_others(study, reader)]
    skip = [*(said.get("skip") or []), *begun]
    found = app.next_sample({**said, "skip": skip, "strategy": strategy, "reader": reader})
    if not found:
        return {}
    request.state.study = found["id"]
    return {**found, "slices": [entry for entry in found["slices"] if entry["why"] == "schedule"]}


@router.post("/infer/{model}", tags=["Infer"])
def infer(model: str, who: Who, image: str = "", params: JsonText = "{}", output: Output = Output.ALL) -> Response:
    """Run a model on a study of the store."""
    if not image:
        raise InputError("say which study of the store: ?image=ID; uploaded images and sessions are not supported")
    said = _json(params)
    app_instance().blinding.check(image, who, _reader(who, said))
    request = {name: said[name] for name in ("job", "save_label", "label_tag") if name in said}
    request["reader"] = who.name
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
def save_label(
    request: Request, image: str, label: UploadFile, who: Who, params: JsonText = "{}", tag: str = "final"
) -> dict[str, Any]:
    """Save a label; with ``annotation`` in the params, a sparse annotation, whose tag the server decides."""
    info = _json(params)
    tag = tag or "final"
    app = app_instance()
    store = app.store
    store.check_study(image)
    said = _attributed(info, who, store.labels.annotation_json(image))
    said |= app.blinding.record(image, str(said.get("reader") or ""))
    with tempfile.TemporaryDirectory(prefix="pe-") as folder, READING:
        meaning = store.save(image, _uploaded(label, Path(folder), "label"), tag, {**_seen(request, image), **said})
    app.on_saved(image, meaning, str(said.get("reader") or ""))
    return {**meaning, "image": image, "label": image}


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
def update_image_info(request: Request, image: str, who: Who, info: JsonText = "{}") -> dict[str, Any]:
    """Add to a study's info; ``pe_label`` is positive, negative or uncertain, "" takes the label back.

    With ``based_on``, the ``label_revision`` that the reader saw (null for none), a label that somebody else gave
    meanwhile is answered 409 with that label.
    """
    given = _attributed(_json(info), who)
    seen = _seen(request, image) if "pe_label" in given else {}
    store, blinding = app_instance().store, app_instance().blinding
    given |= blinding.record(image, str(given.get("reader") or "")) if "pe_label" in given else {}
    store.update_image_info(image, {**seen, **given})
    return {"label": store.label(image), **store.label_version(image)} if "pe_label" in given else {}


@router.put("/datastore/updatelabelinfo", tags=["Datastore"], include_in_schema=False)
@router.put("/datastore/label/info", tags=["Datastore"])
def update_label_info(label: str, tag: str, who: Who, info: JsonText = "{}", params: JsonText = "{}") -> dict[str, Any]:
    """Say something of a label, as the stock Reviewer does."""
    said = {**_json(params), **_json(info)}
    app_instance().datastore().update_label_info(label, tag, {**said, **({"reader": who.name} if who.name else {})})
    return {}


@router.post("/train/{model}", tags=["Train"])
def train(model: str, who: Who, params: JsonObject = None, enqueue: bool = False) -> dict[str, Any]:
    """Start a training in a process of its own, or go on with the one that was stopped."""
    task = app_instance()._trainers.get(model)
    if task is None:
        raise HTTPException(404, f"there is no training {model!r}")
    said = finite_json(params or {})
    task.settings(said)
    known = {name: said[name] for name in task.config() if name in said}
    return vars(app_instance().trainings.submit(model, known, who.name, enqueue=enqueue))


@router.get("/train/", tags=["Train"])
def trainings(all: bool = False, check_if_running: bool = False) -> Any:
    """The last training that was asked for, or all; of former servers, too. 404 if there is none."""
    queue = app_instance().trainings
    found = queue.running() if check_if_running else next(reversed(queue.tasks()), None)
    if found is None:
        raise HTTPException(404, "no training is running" if check_if_running else "no training was asked for yet")
    return [vars(task) for task in queue.tasks()] if all and not check_if_running else vars(found)


@router.delete("/train/", tags=["Train"])
def stop_training() -> dict[str, Any] | None:
    """End the training that runs at its next step; the same request goes on with it."""
    stopped = app_instance().trainings.stop()
    return vars(stopped) if stopped else None


@router.post("/batch/infer/{model}", tags=["Infer"])
def batch_infer(model: str, images: str = "all", params: JsonObject = None) -> dict[str, Any]:
    """Run a model on many studies in a process of its own; the worklist shows what it finds."""
    if model not in app_instance().info()["models"]:
        raise HTTPException(404, f"there is no model {model!r}")
    said = finite_json(params or {})
    if images not in ("all", "labeled", "unlabeled"):
        raise InputError(f"images: expected all, labeled or unlabeled, got {images!r}")
    most = said.get("max_batch_size", 0)
    if not isinstance(most, int) or isinstance(most, bool) or most < 0:
        raise InputError(f"max_batch_size: expected a number of studies, or 0 for all, got {most!r}")
    request = {"model": model, "images": images, "max_batch_size": most}
    started, _ = AsyncTask.run("batch_infer", request=request)
    if started is None:
        raise HTTPException(429, "a batch is running: wait for it or stop it", {"Retry-After": RETRY_SECONDS})
    return dict(started)


# --- our own


@router.get("/pe/worklist", tags=["Pulmonary embolism"])
def worklist(who: Who, reader: str = "") -> Response:
    """Every study: how far its review is, the served model's result, who holds it.

    Where the server reads blinded, results and labels of studies that the ``reader`` has not submitted are left out.
    """
    app = app_instance()
    app.examine_new_studies()
    rows = app.worklist.rows()
    if app.blinding.on:
        rows = [app.blinding.row(row, who, who.name or reader) for row in rows]
    return JSONResponse({"studies": rows})


@router.get("/pe/studies/{study}", tags=["Pulmonary embolism"])
def study_details(study: str, who: Who, reader: str = "") -> dict[str, Any]:
    """One study: its schedule, the annotation that counts, the last detection of the served model.

    Where the server reads blinded, without results until the ``reader`` has submitted it.
    """
    app = app_instance()
    details: dict[str, Any] = app.blinding.details(app.worklist.details(study), who, who.name or reader)
    return details


@router.post("/pe/studies/{study}/lease", tags=["Pulmonary embolism"])
def take_lease(study: str, who: Who, body: JsonObject = None) -> dict[str, str]:
    """Hold a study for half an hour, so that others get another one."""
    app = app_instance()
    app.datastore().check_study(study)
    return app.leases.take(study, _reader(who, body)).to_json()


@router.delete("/pe/studies/{study}/lease", tags=["Pulmonary embolism"])
def release_lease(study: str, who: Who, body: JsonObject = None) -> dict[str, Any]:
    """Let others have a study that this reader holds; an admin who says ``force`` lets go whoever holds it."""
    app = app_instance()
    app.datastore().check_study(study)
    forced = bool((body or {}).get("force"))
    if forced and not who.role.includes(Role.ADMIN):
        raise HTTPException(403, f"{who.name} has the role {who.role}, which ends no lease of others")
    released = app.leases.release(study, None if forced else _reader(who, body))
    return {"released": released, "held_by": app.leases.holder(study) or None}


@router.get("/pe/jobs/{job}", tags=["Pulmonary embolism"])
def job_state(job: str) -> dict[str, Any]:
    """Where a detection is."""
    found = app_instance().jobs.get(job)
    if found is None:
        raise HTTPException(404, f"there is no job {job!r}")
    return vars(found)


@router.delete("/pe/jobs/{job}", tags=["Pulmonary embolism"])
def cancel_job(job: str, who: Who) -> dict[str, Any]:
    """Ask a detection to stop; the request that waits for it is answered 409."""
    jobs = app_instance().jobs
    owner = jobs.owner(job)
    if owner not in ("", who.name) and not who.role.includes(Role.ADMIN):
        raise HTTPException(403, f"job {job!r} is {owner}'s: only {owner} or an admin can cancel it")
    if not jobs.cancel(job):
        raise HTTPException(404, f"no job {job!r} is running")
    return {}


@router.get("/pe/training", tags=["Pulmonary embolism"])
def training() -> dict[str, Any]:
    """How far both trainings are, with the figures of every epoch, and all trainings that were asked for."""
    app = app_instance()
    running = app.trainings.running() is not None
    stages = {name: task.stats() or None for name, task in app._trainers.items()}
    for status in stages.values():
        if status and status["state"] == "running" and not running:
            status["state"] = "interrupted"  # its process was killed and could not say so
    return {**stages, "running": running, "tasks": [vars(task) for task in app.trainings.tasks()]}


@router.get("/pe/studies/{study}/history", tags=["Pulmonary embolism"])
def history(study: str, who: Who, reader: str = "") -> dict[str, Any]:
    """Every save of a study, the latest first: who, when, with what program, after which model, what."""
    app_instance().blinding.check(study, who, who.name or reader)
    return {"study": study, "versions": app_instance().store.versions(study)}


@router.get("/pe/studies/{study}/history/{revision}", tags=["Pulmonary embolism"])
def version(study: str, revision: str) -> dict[str, Any]:
    """One save; of an annotation with its reviewed slices."""
    entry, _ = app_instance().store.version(study, revision)
    return entry


@router.get("/pe/studies/{study}/history/{revision}/label", tags=["Pulmonary embolism"], response_class=FileResponse)
def version_label(study: str, revision: str) -> FileResponse:
    """The label file of one save, as it was then."""
    _, file = app_instance().store.version(study, revision)
    if file is None:
        raise HTTPException(404, f"version {revision} of study {study} has no label file")
    _, ending = split_ending(file.name)
    return FileResponse(file, media_type="application/octet-stream", filename=f"{study}{ending}")


@router.post("/pe/studies/{study}/history/{revision}/restore", tags=["Pulmonary embolism"])
def restore(request: Request, study: str, revision: str, who: Who, body: JsonObject = None) -> dict[str, Any]:
    """Let an earlier save count again, as a new one; ``based_on`` as for any save."""
    said = finite_json(body or {})
    given = {name: said[name] for name in ("based_on", "client", "model_seen") if name in said}
    info = {**_seen(request, study), "reader": _reader(who, said), **given}
    app = app_instance()
    entry: dict[str, Any] = app.store.restore(study, revision, info)
    app.on_saved(study, entry, "")
    return entry


@router.get("/pe/models", tags=["Pulmonary embolism"])
def models() -> dict[str, Any]:
    """The models that were published here, which is served, and whether it is pinned."""
    app = app_instance()
    served = vars(app.models.current().identity)
    kept = [entry.to_json() for entry in app.models.kept()]
    return {"served": served, "pinned": app.models.serving().pinned, "models": kept}


@router.post("/pe/models/{model}/pin", tags=["Pulmonary embolism"])
def pin_model(model: str) -> dict[str, Any]:
    """Serve a kept model (version, or first characters of its SHA-256), also when others are published."""
    app_instance().models.pin(model)
    return models()


@router.delete("/pe/models/pin", tags=["Pulmonary embolism"])
def unpin_model() -> dict[str, Any]:
    """Let the next model that is published be served."""
    app_instance().models.unpin()
    return models()


@router.post("/pe/models/rollback", tags=["Pulmonary embolism"])
def roll_back_model() -> dict[str, Any]:
    """Serve the model that was served before."""
    app_instance().models.rollback()
    return models()


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


def _seen(request: Request, study: str) -> dict[str, Any]:
    """What is recorded with a save where the client does not say it: the program, and the model that was looked at."""
    app = app_instance()
    app.store.check_study(study)
    client = printable(request.headers.get("user-agent", ""))[:LONGEST]
    model = app.detections.shown(study)
    return {"client": client, "model_seen": vars(model) if model else None}


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
