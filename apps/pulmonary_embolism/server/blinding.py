"""Blinded reading: until a reader has submitted a study, no result of the model and no other reader's word is sent.

A reader has submitted once the reader's label, or the reader's complete review, is saved. From then on everything is
shown, and whatever the same reader saves later says so: ``unblinded`` is the time of the first submission.
"""

from __future__ import annotations

from typing import Any

from pe_monailabel.server.access import Caller, Role
from pe_monailabel.store.labels import ANNOTATION_LINE, FINAL, STUDY_LABEL_LINE
from pe_monailabel.store.studies import StudyStore

HIDDEN_OF_ROW = {
    "probability": None, "model": None, "status": None, "reasons": [], "label": "", "label_reader": "",
    "label_time": "", "label_revision": None,
}  # fmt: skip
"""What a row of the worklist shows instead."""

STRATEGIES = ("next_unreviewed", "random")
"""Those whose order tells nothing of the model's result."""


class Blinded(PermissionError):  # noqa: N818 - a state, not a fault
    """What was asked for is not shown before the reader has submitted the study."""


class Blinding:
    """What readers may see.

    Args:
        store: whose saves tell who has submitted.
        on: whether the server reads blinded.
    """

    def __init__(self, store: StudyStore, on: bool) -> None:
        self._store = store
        self.on = on

    def unblinded(self, study: str, reader: str) -> str:
        """When a reader submitted a study for the first time, ISO 8601; "" for not yet."""
        history = self._store.history
        labels = [
            version.info
            for version in history.versions(study, STUDY_LABEL_LINE)
            if version.info.get("reader") == reader and version.info.get("pe_label")
        ]
        reviews = [
            version.info
            for version in history.versions(study, ANNOTATION_LINE)
            if version.info.get("reader") == reader and version.tag == FINAL
        ]
        return min((str(info.get("time", "")) for info in [*labels, *reviews]), default="") if reader else ""

    def hides(self, study: str, who: Caller, reader: str) -> bool:
        """Whether a caller must not see results of a study yet; an administrator with a token sees all."""
        if not self.on or (who.name and who.role.includes(Role.ADMIN)):
            return False
        return not self.unblinded(study, reader)

    def row(self, row: dict[str, Any], who: Caller, reader: str) -> dict[str, Any]:
        """A row of the worklist as this caller may see it."""
        if not self.hides(str(row["study"]), who, reader):
            return row
        state = "not_started" if row["state"] == "labelled" else row["state"]
        return {**row, **HIDDEN_OF_ROW, "state": state, "blinded": True}

    def details(self, details: dict[str, Any], who: Caller, reader: str) -> dict[str, Any]:
        """All of a study as this caller may see it.

        Raises:
            Blinded: if another reader has begun its review: one's own would not be blind.
        """
        study = str(details["study"])
        if not self.hides(study, who, reader):
            return details
        others = self.begun_by_others(study, reader)
        if others:
            names = ", ".join(sorted(others))
            raise Blinded(f"study {study} is read by {names}; on this server nobody sees another reader's work first")
        schedule = [entry for entry in details["schedule"] if entry["why"] == "schedule" or entry["reviewed"]]
        shown = [{**entry, "why": "schedule"} for entry in schedule]
        return {**self.row(details, who, reader), "schedule": shown, "detection": None}

    def begun_by_others(self, study: str, reader: str) -> set[str]:
        """The other readers whose label or slices count for a study."""
        annotation = self._store.labels.annotation_json(study) or {}
        names = {str(entry.get("reader") or "") for entry in annotation.get("slices", ())}
        return {*names, self._store.label_version(study)["label_reader"]} - {reader, ""}

    def check(self, study: str, who: Caller, reader: str) -> None:
        """Refuse results of the model.

        Raises:
            Blinded: if the caller has not submitted the study.
        """
        if self.hides(study, who, reader):
            raise Blinded(f"study {study}: results are shown after you have submitted it; this server reads blinded")

    def check_stock(self, path: str, study: str, who: Caller, reader: str) -> None:
        """Refuse what MONAI Label's own routes would give away: listings and info of labels, others' outlines.

        Raises:
            Blinded: if the caller may not see it.
        """
        if not self.on or (who.name and who.role.includes(Role.ADMIN)):
            return
        if not study:
            raise Blinded(f"{path}: this server reads blinded, and the list tells of labels")
        if path != "/datastore/label" or self.begun_by_others(study, reader):
            self.check(study, who, reader)

    def record(self, study: str, reader: str) -> dict[str, Any]:
        """What a save says of the circumstances: made blind, or after the results were shown, and since when."""
        if not self.on:
            return {}
        since = self.unblinded(study, reader)
        return {"unblinded": since} if since else {"blinded": True}
