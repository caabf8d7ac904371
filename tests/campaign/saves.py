"""Every kind of save, one at a time: how to send it under a mark, what it shows then, and what counts now."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import requests

from campaign.journal import Journal, Kind, annotation, annotation_content, label_content, label_file
from campaign.world import STUDIES, World

KINDS: tuple[Kind, ...] = ("annotation", "label", "study label", "label info")


@dataclass(frozen=True)
class KindOfSave:
    """One kind of save to one study.

    Attributes:
        what: for people.
        send: sends it under a mark.
        content: what counts after it.
        shown: what counts now.
    """

    what: str
    send: Callable[[str], requests.Response]
    content: Callable[[str], str]
    shown: Callable[[], str | None]


def kinds_of_save(world: World) -> list[KindOfSave]:
    """All kinds, for the first study of a running server."""
    study = STUDIES[0]
    schedule = world.schedule(study)
    journal = Journal(world)
    world.put_label(study, {}, label_file(world, study, [1]), "reviewed").raise_for_status()

    def kind(
        what: str, line: Kind, send: Callable[[str], requests.Response], content: Callable[[str], str]
    ) -> KindOfSave:
        return KindOfSave(what, send, content, lambda: journal.shown(line, study))

    def review(what: str, slices: list[int]) -> KindOfSave:
        def made(mark: str) -> tuple[dict[str, object], bytes]:
            return annotation(world, study, slices, mark, "00", np.random.default_rng(list(mark.encode())))

        def content(mark: str) -> str:
            params, label = made(mark)
            return annotation_content(params["annotation"]["slices"], label)

        return kind(what, "annotation", lambda mark: world.put_label(study, *made(mark)), content)

    def label(mark: str) -> bytes:
        return label_file(world, study, list(mark.encode()))

    def say(path: str, query: dict[str, str], info: object) -> requests.Response:
        return world.request("PUT", path, params=query, data={"info": json.dumps(info)})

    def say_of_study(mark: str) -> requests.Response:
        return say("/datastore/image/info", {"image": study}, {"pe_label": "positive", "note": mark})

    def say_of_label(mark: str) -> requests.Response:
        query = {"label": study, "tag": "reviewed"}
        return say("/datastore/label/info", query, {"segmentationMeta": {"comment": mark}})

    return [
        review("draft", schedule[:3]),
        review("final", schedule),
        review("draft again", schedule[:5]),
        kind("plain label", "label", lambda mark: world.put_label(study, {}, label(mark), "second"),
             lambda mark: label_content(label(mark))),
        kind("study label", "study label", say_of_study, str),
        kind("label info", "label info", say_of_label, str),
    ]  # fmt: skip


def state(world: World) -> dict[tuple[str, str], str | None]:
    """What clients see of everything that was saved."""
    journal = Journal(world)
    index = world.request("GET", "/datastore/?output=all").json()["objects"]
    shown = {(kind, study): journal.shown(kind, study, index) for kind in KINDS for study in STUDIES}
    return {**shown, ("studies", "all"): " ".join(sorted(index))}
