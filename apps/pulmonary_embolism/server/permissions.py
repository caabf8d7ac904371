"""Every route of the server: which role it asks for, what it does to the studies, how much may be sent to it.

The table decides, not the routes: what is not in it is the admins' alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from starlette.datastructures import QueryParams
from starlette.routing import BaseRoute, Match
from starlette.types import Scope

from pe_monailabel.server.access import Role


@dataclass(frozen=True)
class Rule:
    """What is decided of a route.

    Attributes:
        role: who may ask; None for anybody, also without a token.
        does: the word for it in the audit log; "" is not logged: it touches no study, and clients ask all the time.
        upload: whether a file may come with it.
    """

    role: Role | None
    does: str = ""
    upload: bool = False


_OPEN = Rule(None)
_LOOK = Rule(Role.READER)
_READ = Rule(Role.READER, "read")
_DETECT = Rule(Role.READER, "detected")
_WRITE = Rule(Role.ANNOTATOR, "wrote")
_UPLOAD = Rule(Role.ANNOTATOR, "wrote", upload=True)
_HOLD = Rule(Role.ANNOTATOR, "held")
_REMOVE = Rule(Role.ADMIN, "removed")
_RESTORE = Rule(Role.ADMIN, "restored")
_CHOOSE = Rule(Role.ADMIN, "chose a model")
_TRAIN = Rule(Role.ADMIN, "trained")
_STOP = Rule(Role.ADMIN, "stopped")
UNDECIDED = Rule(Role.ADMIN, "did")

LONGEST = 200
"""Characters of a name that are written to the audit log."""

RULES: dict[str, Rule] = {
    "GET /": _OPEN,
    "GET /auth/": _OPEN,
    "POST /auth/token": _OPEN,
    "GET /auth/token/valid": _LOOK,
    "GET /openapi.json": _LOOK,
    "GET /info/": _LOOK,
    "GET /pe/worklist": _LOOK,
    "GET /pe/studies/{study}": _READ,
    "GET /pe/studies/{study}/history": _READ,
    "GET /pe/studies/{study}/history/{revision}": _READ,
    "GET /pe/studies/{study}/history/{revision}/label": _READ,
    "POST /pe/studies/{study}/history/{revision}/restore": _RESTORE,
    "GET /pe/models": _LOOK,
    "POST /pe/models/{model}/pin": _CHOOSE,
    "DELETE /pe/models/pin": _CHOOSE,
    "POST /pe/models/rollback": _CHOOSE,
    "POST /pe/studies/{study}/lease": _HOLD,
    "DELETE /pe/studies/{study}/lease": _HOLD,
    "POST /activelearning/{strategy}": _HOLD,
    "GET /datastore/": _READ,
    "GET /datastore/image": _READ,
    "GET /datastore/image/info": _READ,
    "GET /datastore/label": _READ,
    "GET /datastore/label/info": _READ,
    "PUT /datastore/": _UPLOAD,
    "PUT /datastore/image": _UPLOAD,
    "PUT /datastore/image/info": _WRITE,
    "PUT /datastore/label": _UPLOAD,
    "PUT /datastore/label/info": _WRITE,
    "PUT /datastore/updatelabelinfo": _WRITE,
    "DELETE /datastore/image": _REMOVE,
    "DELETE /datastore/label": _REMOVE,
    "POST /infer/{model}": _DETECT,
    "GET /pe/jobs/{job}": _LOOK,
    "DELETE /pe/jobs/{job}": _LOOK,
    "GET /batch/infer": _LOOK,
    "POST /batch/infer/{model}": Rule(Role.ADMIN, "detected"),
    "DELETE /batch/infer": _STOP,
    "GET /pe/training": _LOOK,
    "GET /train/": _LOOK,
    "POST /train/{model}": _TRAIN,
    "DELETE /train/": _STOP,
}


@dataclass(frozen=True)
class Asked:
    """What a request asks for: method and route, the rule, and what it is about, for the audit log."""

    request: str
    rule: Rule
    about: dict[str, str]


def asked(scope: Scope, routes: Iterable[BaseRoute]) -> Asked:
    """Which route a request is for; one that is for none may be asked by any reader, who is told so."""
    method = scope["method"]
    for route in routes:
        match, child = route.matches(scope)
        if match is Match.FULL:
            path = getattr(route, "path", "")
            rule = RULES.get(f"{method} {path}") or (RULES.get(f"GET {path}") if method == "HEAD" else None)
            return Asked(f"{method} {path}", rule or UNDECIDED, _about(scope, child.get("path_params", {})))
    return Asked(f"{method} {scope['path']}"[:LONGEST], _LOOK, {})


def _about(scope: Scope, path_params: dict[str, object]) -> dict[str, str]:
    """The study and other names in a request, cut to what a name may be; nothing else of its query."""
    query = QueryParams(scope["query_string"])
    study = path_params.get("study") or query.get("image") or query.get("label") or query.get("id")
    names = {"study": study, "tag": query.get("tag"), **path_params}
    return {name: str(value)[:LONGEST] for name, value in names.items() if value}
