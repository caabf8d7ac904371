r"""How the app is served: on this machine only unless tokens are asked for, nothing blocks, every error is a sentence.

``pe-app serve STUDIES`` calls ``serve``. For people who know MONAI Label:
``monailabel start_server --app apps/pulmonary_embolism --studies STUDIES \
    --uvicorn_app pe_monailabel.server.serving:app``
"""

from __future__ import annotations

import pe_monailabel.compat  # noqa: F401 - before monailabel

# isort: split
import errno
import inspect
import json
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from monailabel.config import settings
from monailabel.endpoints import batch_infer, datastore
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException, MONAILabelException
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.async_tasks import utils as tasks
from starlette.exceptions import HTTPException

import pe_app
from pe_app.common.errors import InputError, TooLarge
from pe_app.common.memory import keep_freed_memory
from pe_app.common.progress import Cancelled
from pe_monailabel.server import routes
from pe_monailabel.server.access import TokenFile
from pe_monailabel.server.audit import Audit
from pe_monailabel.server.blinding import Blinded
from pe_monailabel.server.limits import DETECTION_SECONDS, RETRY_SECONDS, Busy, TooLong
from pe_monailabel.server.listen import Door
from pe_monailabel.server.middleware import Guard, is_loopback
from pe_monailabel.server.possession import Possession
from pe_monailabel.server.protocol import PunctualProtocol
from pe_monailabel.server.temporary import TemporaryFolder
from pe_monailabel.store.archive import ArchiveSettings, ArchiveStore
from pe_monailabel.store.labels import Conflict
from pe_monailabel.tasks.detection import SERVER_PID

logger = logging.getLogger(__name__)

APP_DIR = Path(__file__).resolve().parent.parent

KEPT = {
    ("GET", "/datastore/"),
    ("GET", "/datastore/image"),
    ("HEAD", "/datastore/image"),
    ("DELETE", "/datastore/image"),
    ("GET", "/datastore/image/info"),
    ("GET", "/datastore/label"),
    ("HEAD", "/datastore/label"),
    ("DELETE", "/datastore/label"),
    ("GET", "/datastore/label/info"),
    ("GET", "/batch/infer"),
    ("DELETE", "/batch/infer"),
}
"""MONAI Label's own routes that are served as they are, each in a thread."""

TELLING = {
    ("GET", "/datastore/"),
    ("GET", "/datastore/image/info"),
    ("GET", "/datastore/label"),
    ("GET", "/datastore/label/info"),
}
"""Those of them that tell of labels."""

NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
"""What a folder that may not be written answers."""

STATUS: dict[type[Exception], int] = {
    ImageNotFoundException: 404,
    LabelNotFoundException: 404,
    MONAILabelException: 404,  # all that the kept routes raise: no such model, no such strategy
    Blinded: 403,
    Conflict: 409,
    Cancelled: 409,
    TooLarge: 413,
    InputError: 422,
    Busy: 429,
    TooLong: 504,
}


def serve(
    studies: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    model: Path | None = None,
    door: Door = Door(),  # noqa: B008 - frozen
    detection_seconds: float = DETECTION_SECONDS,
    archive: ArchiveSettings | None = None,
    *,
    blinded: bool = False,
) -> None:
    """Serve a folder of studies, or an archive, until interrupted.

    Args:
        studies: the folder; labels, models and trainings are kept in it, and what is fetched from an archive.
        host: an address of this machine.
        port: of the server.
        model: the model to start with, until a training publishes one; by default the one that ships.
        door: how it is reached.
        detection_seconds: a detection that takes longer is stopped.
        archive: where the studies come from, if not from the folder alone.
        blinded: whether readers see no results of a study before they have submitted it.

    Raises:
        InputError: if the folder, the archive, the model or the door cannot be used.
    """
    door.check(host)
    if archive is not None:
        studies.mkdir(parents=True, exist_ok=True)
    if not studies.is_dir():
        raise InputError(f"{studies}: there is no such folder")
    if model is not None and not model.is_file():
        raise InputError(f"model {model}: there is no such file")
    settings.MONAI_LABEL_APP_DIR = str(APP_DIR)
    settings.MONAI_LABEL_STUDIES = str(studies.resolve())
    conf = {"model": str(model.resolve())} if model else {}
    if blinded:
        conf["blinded"] = "true"
    settings.MONAI_LABEL_APP_CONF = {**conf, **(archive.conf() if archive else {})}
    settings.MONAI_LABEL_SERVER_PORT = port
    _tell_tasks()
    try:
        instance = app_instance()
    except OSError as error:
        if error.errno not in NOT_ALLOWED:
            raise
        raise InputError(
            f"{studies}: cannot be served, since {error.filename} cannot be written: {error.strerror}"
        ) from error
    instance.models.current()  # a folder or model that cannot be used is reported here, before the server starts
    app.possession = _take(instance.store.private)
    if isinstance(instance.store, ArchiveStore):
        instance.store.follow()
    instance.jobs.seconds = detection_seconds
    app.tokens = TokenFile(door.tokens) if door.tokens else None
    beyond = door.allowed_hosts or not is_loopback(host)
    app.hosts = frozenset(name.lower() for name in door.allowed_hosts) if beyond else None
    app.upload_bytes = door.upload_bytes
    scheme = "https" if door.certificate else "http"
    logger.info("%s://%s:%d serves %s; stop it with Ctrl-C. Research use only.", scheme, host, port, studies)
    uvicorn.run(
        app,
        host=host,
        port=port,
        ssl_certfile=door.certificate,
        ssl_keyfile=door.key,
        log_config=None,
        http=PunctualProtocol,
        proxy_headers=False,  # anybody can write X-Forwarded-For
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=10,
    )


def _tell_tasks() -> None:
    """Settings that this app needs, here and in the processes of its tasks, which read the environment."""
    if settings.MONAI_LABEL_AUTH_ENABLE:
        raise InputError("MONAI_LABEL_AUTH_ENABLE: MONAI Label 0.8.5 accepts nobody with it; leave it off")
    settings.MONAI_LABEL_AUTO_UPDATE_SCORING = False
    settings.MONAI_LABEL_TRACKING_ENABLED = False
    settings.MONAI_LABEL_SESSIONS = False
    for name, value in settings.model_dump().items():
        if value is not None:
            os.environ[name] = json.dumps(value, default=str) if isinstance(value, (list, dict)) else str(value)
    os.environ[SERVER_PID] = str(os.getpid())
    os.environ["PYTHONSAFEPATH"] = "1"  # a task runs this program's modules, whatever lies in the current folder
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # an empty entry is the current folder, too


def _take(private: Path) -> Possession:
    """Keep the folder for this server, which ends if another one takes it."""
    possession = Possession(private / "server.json", lambda: os.kill(os.getpid(), signal.SIGTERM))
    possession.take()
    return possession


@asynccontextmanager
async def _lifespan(_: FastAPI) -> AsyncIterator[None]:
    keep_freed_memory()  # pe-app did; MONAI Label's own command does not
    instance = app_instance()
    instance.server_mode(True)
    instance.models.current()
    private = instance.store.private
    possession = app.possession or _take(private)
    app.audit = Audit(private / "audit.jsonl")
    app.temporary = TemporaryFolder(private / "tmp")
    app.temporary.use()
    instance.trainings.open()
    instance.examine_new_studies()
    yield
    instance.jobs.cancel_all()
    instance.trainings.close()
    app.temporary.remove()
    possession.give_back()
    app.possession = None
    for method, executor in tasks.background_executors.items():
        executor.shutdown(wait=False, cancel_futures=True)
        tasks.stop_background_task(method)


def _in_a_thread(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A stock endpoint, ``async`` but never waiting, as a plain function, which FastAPI runs in a thread."""

    def call(**arguments: Any) -> Any:
        coroutine = endpoint(**arguments)
        try:
            coroutine.send(None)
        except StopIteration as finished:
            return finished.value
        raise RuntimeError(f"{endpoint.__name__} waits: it cannot run in a thread")

    call.__name__, call.__doc__ = endpoint.__name__, endpoint.__doc__
    call.__signature__ = inspect.signature(endpoint)  # type: ignore[attr-defined]
    return call


def _make_app() -> FastAPI:
    # no pages of the documentation: they load scripts from another server into this one's origin
    made = FastAPI(
        title="Pulmonary embolism", version=pe_app.__version__, lifespan=_lifespan, docs_url=None, redoc_url=None
    )
    made.router.routes.extend(routes.router.routes)
    for stock in (datastore, batch_infer):
        for route in stock.router.routes:
            methods = {method for method in route.methods if (method, route.path) in KEPT}
            if methods:
                made.add_api_route(
                    route.path,
                    _in_a_thread(route.endpoint),
                    methods=list(methods),
                    tags=route.tags,
                    summary=route.summary,
                    dependencies=[Depends(routes.not_blind)] if (min(methods), route.path) in TELLING else None,
                )
    for kind in STATUS:
        made.add_exception_handler(kind, _known_error)
    made.add_exception_handler(RequestValidationError, _invalid_request)
    made.add_exception_handler(HTTPException, _http_error)
    made.add_exception_handler(Exception, _unknown_error)
    return made


def _known_error(_: Request, error: Exception) -> JSONResponse:
    status = next(status for kind, status in STATUS.items() if isinstance(error, kind))
    content: dict[str, Any] = {"detail": getattr(error, "msg", str(error))}
    if isinstance(error, Conflict):
        content |= (
            {"label": error.label} if error.label else {"revision": error.revision, "annotation": error.annotation}
        )
    return JSONResponse(content, status, {"Retry-After": RETRY_SECONDS} if status == 429 else None)


async def _http_error(request: Request, error: HTTPException) -> Response:
    """Also a body that could not be read because the disk is full, which FastAPI takes for a bad request."""
    if isinstance(error.__cause__, OSError):
        return _unknown_error(request, error.__cause__)
    if error.detail == HTTPStatus(error.status_code).phrase:  # no route's own words
        error.detail = f"{request.method} {request.url.path} is not served here; /openapi.json lists what is"
    return await http_exception_handler(request, error)


def _invalid_request(_: Request, error: RequestValidationError) -> JSONResponse:
    problems = [f"{'.'.join(map(str, problem['loc'][1:]))}: {problem['msg']}" for problem in error.errors()]
    return JSONResponse({"detail": "; ".join(problems)}, 422)


def _unknown_error(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return JSONResponse({"detail": "the server's disk is full; nothing was changed"}, 507)
    if isinstance(error, OSError) and error.errno in NOT_ALLOWED:
        logger.error("%s", error)
        detail = (
            "the server may not write into its folder; nothing was changed: its administrator finds the file in the log"
        )
        return JSONResponse({"detail": detail}, 500)
    return JSONResponse({"detail": "the server failed at this request; its log says why"}, 500)


_tell_tasks()
api = _make_app()
app = Guard(api, api.routes)
