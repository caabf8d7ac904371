"""How the app is served: on this machine only, nothing blocks, every error is a sentence.

``pe-app serve STUDIES`` calls ``serve``. For people who know MONAI Label:
``monailabel start_server --app apps/pulmonary_embolism --studies STUDIES --uvicorn_app pe_monailabel.lib.server:app``.
"""

from __future__ import annotations

import lib.compat  # noqa: F401 - before monailabel

# isort: split
import errno
import inspect
import json
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from lib import routes
from lib.guard import LoopbackOnly, is_loopback
from lib.infer import Busy
from lib.store import Conflict
from lib.train import SERVER_PID
from monailabel.config import settings
from monailabel.endpoints import activelearning, batch_infer, datastore, info, train
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException, MONAILabelException
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.async_tasks import utils as tasks

import pe_app
from pe_app.errors import InputError
from pe_app.progress import Cancelled

logger = logging.getLogger(__name__)

APP_DIR = Path(__file__).resolve().parent.parent

KEPT = {
    ("GET", "/info/"),
    ("POST", "/activelearning/{strategy}"),
    ("GET", "/datastore/"),
    ("GET", "/datastore/image"),
    ("HEAD", "/datastore/image"),
    ("DELETE", "/datastore/image"),
    ("GET", "/datastore/image/info"),
    ("GET", "/datastore/label"),
    ("HEAD", "/datastore/label"),
    ("DELETE", "/datastore/label"),
    ("GET", "/datastore/label/info"),
    ("GET", "/train/"),
    ("DELETE", "/train/"),
    ("GET", "/batch/infer"),
    ("DELETE", "/batch/infer"),
}
"""MONAI Label's own routes that are served as they are, each in a thread."""

STATUS: dict[type[Exception], int] = {
    ImageNotFoundException: 404,
    LabelNotFoundException: 404,
    MONAILabelException: 404,  # all that the kept routes raise: no such model, no such strategy
    Conflict: 409,
    Cancelled: 409,
    InputError: 422,
    Busy: 429,
}


def serve(studies: Path, host: str = "127.0.0.1", port: int = 8000, model: Path | None = None) -> None:
    """Serve a folder of studies until interrupted.

    Args:
        studies: the folder; labels, models and trainings are kept in it.
        host: an address of this machine.
        port: of the server.
        model: the model to start with, until a training publishes one; by default the one that ships.

    Raises:
        InputError: if the folder or the model cannot be used, or the address is not of this machine.
    """
    if not is_loopback(host):
        raise InputError(
            f"--host {host}: this server checks no passwords, so it listens on this machine only (127.0.0.1); "
            "reach it from another one through an SSH tunnel"
        )
    if not studies.is_dir():
        raise InputError(f"{studies}: there is no such folder")
    if model is not None and not model.is_file():
        raise InputError(f"model {model}: there is no such file")
    settings.MONAI_LABEL_APP_DIR = str(APP_DIR)
    settings.MONAI_LABEL_STUDIES = str(studies.resolve())
    settings.MONAI_LABEL_APP_CONF = {"model": str(model.resolve())} if model else {}
    settings.MONAI_LABEL_SERVER_PORT = port
    _tell_tasks()
    app_instance().served.current()  # a folder or model that cannot be used is said here, before the server starts
    logger.info("http://%s:%d serves %s; stop it with Ctrl-C. Research use only.", host, port, studies)
    uvicorn.run(app, host=host, port=port, log_config=None, access_log=False, timeout_graceful_shutdown=10)


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
    os.environ["MONAI_LABEL_RELOAD_APP_LIB"] = "false"  # server and app share their modules
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*filter(None, paths), str(APP_DIR)]))


@asynccontextmanager
async def _lifespan(_: FastAPI) -> AsyncIterator[None]:
    instance = app_instance()
    instance.server_mode(True)
    instance.served.current()
    instance.examine_new_studies()
    yield
    instance.jobs.cancel_all()
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
    made = FastAPI(title="Pulmonary embolism", version=pe_app.__version__, lifespan=_lifespan)
    made.include_router(routes.router)
    for stock in (info, activelearning, datastore, train, batch_infer):
        for route in stock.router.routes:
            methods = {method for method in route.methods if (method, route.path) in KEPT}
            if methods:
                made.add_api_route(
                    route.path,
                    _in_a_thread(route.endpoint),
                    methods=list(methods),
                    tags=route.tags,
                    summary=route.summary,
                )
    for kind in STATUS:
        made.add_exception_handler(kind, _known_error)
    made.add_exception_handler(RequestValidationError, _invalid_request)
    made.add_exception_handler(Exception, _unknown_error)
    made.add_middleware(LoopbackOnly)
    return made


def _known_error(_: Request, error: Exception) -> JSONResponse:
    status = next(status for kind, status in STATUS.items() if isinstance(error, kind))
    content: dict[str, Any] = {"detail": getattr(error, "msg", str(error))}
    if isinstance(error, Conflict):
        content |= {"revision": error.revision, "annotation": error.annotation}
    return JSONResponse(content, status)


def _invalid_request(_: Request, error: RequestValidationError) -> JSONResponse:
    problems = [f"{'.'.join(map(str, problem['loc'][1:]))}: {problem['msg']}" for problem in error.errors()]
    return JSONResponse({"detail": "; ".join(problems)}, 422)


def _unknown_error(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return JSONResponse({"detail": "the server's disk is full; nothing was changed"}, 507)
    return JSONResponse({"detail": "the server failed at this request; its log says why"}, 500)


_tell_tasks()
app = _make_app()
