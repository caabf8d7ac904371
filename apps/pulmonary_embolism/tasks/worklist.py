"""Which study a reader gets next: what is known of each, who holds it, and MONAI Label's strategies on top.

The choice itself is ``pe_app.annotation.review``'s; here it meets the store, the detections and the leases.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.datastore.local import ImageLabelModel
from monailabel.interfaces.tasks.strategy import Strategy as StrategyTask

from pe_app.annotation.review import SliceToReview, Strategy, StudyState, Work, rank_studies, slices_to_review
from pe_app.common.errors import InputError
from pe_app.common.files import write_durably
from pe_monailabel.store.images import ImageFacts
from pe_monailabel.store.labels import Conflict
from pe_monailabel.store.studies import OUTDATED, StudyStore, review_of
from pe_monailabel.tasks.detection import Detections, Summary

logger = logging.getLogger(__name__)

LEASE_MINUTES = 30
ANONYMOUS = "anonymous"
"""How a lease names a stock client that does not say who asks."""

_DESCRIPTIONS: dict[Strategy, str] = {
    "next_unreviewed": "Studies begun first, then those that nobody looked at",
    "most_uncertain": "Studies whose probability is nearest the threshold",
    "disagreement": "Studies where the two stages, the label or the reader contradict each other",
    "random": "A study drawn at random, the baseline for the others",
}


@dataclass(frozen=True)
class Lease:
    """Who reads a study, and until when (seconds since 1970)."""

    reader: str
    until: float

    def to_json(self) -> dict[str, str]:
        """As clients see it, ISO 8601 in UTC."""
        until = datetime.fromtimestamp(self.until, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        return {"reader": self.reader, "until": until}


class Leases:
    """Who reads what: two readers who ask at once get different studies. Outlives a restart of the server.

    How long a lease lasts is counted by a clock that nobody sets; the time of day is for people, and for a restart,
    after which a lease lasts no longer than a new one.
    """

    def __init__(self, path: Path, minutes: float = LEASE_MINUTES) -> None:
        self._path = path
        self._seconds = 60 * minutes
        self.lock = threading.RLock()
        self._held: dict[str, Lease] = {}
        self._ends: dict[str, float] = {}
        if path.is_file():
            try:
                held = json.loads(path.read_text(encoding="utf-8"))
                self._held = {study: Lease(str(reader), float(until)) for study, (reader, until) in held.items()}
            except (ValueError, TypeError, AttributeError):
                path.unlink()  # leases are worth half an hour, not a refusal to start
        for study, lease in self._held.items():
            self._ends[study] = time.monotonic() + min(lease.until - time.time(), self._seconds)

    def holder(self, study: str) -> str:
        """Who reads a study now; "" for nobody."""
        lease = self._held.get(study)
        return lease.reader if lease and self._ends[study] > time.monotonic() else ""

    def take(self, study: str, reader: str, *, alone: bool = False) -> Lease:
        """Hold a study from now on for half an hour; whoever holds it already, holds it longer.

        Args:
            study: the study.
            reader: who reads it.
            alone: whether the reader's other studies become free: a reader who asks for the next one has left them.

        Raises:
            Conflict: if somebody else holds it.
        """
        if not reader or len(reader) > 64 or not reader.isprintable():
            raise InputError("reader: say who reads, with at most 64 printable characters")
        with self.lock:
            holder = self.holder(study)
            if holder not in ("", reader):
                raise Conflict(f"study {study} is being read by {holder}")
            lease = Lease(reader, time.time() + self._seconds)
            others = {other: held for other, held in self._held.items() if not (alone and held.reader == reader)}
            self._ends[study] = time.monotonic() + self._seconds
            self._keep({**others, study: lease})
            return lease

    def prolong(self, study: str, reader: str) -> None:
        """A reader who saves is at work: another half hour, if the study is still this reader's."""
        with self.lock:
            if self.holder(study) == reader:
                self.take(study, reader)

    def release(self, study: str, reader: str | None = None) -> bool:
        """Let others have a study; whether nobody holds it now.

        Args:
            study: the study.
            reader: who lets go; somebody else's lease stays. None: whoever holds it.
        """
        with self.lock:
            if study in self._held and reader in (None, self._held[study].reader):
                self._keep({other: lease for other, lease in self._held.items() if other != study})
            return not self.holder(study)

    def _keep(self, held: Mapping[str, Lease]) -> None:
        self._held = {study: lease for study, lease in held.items() if self._ends[study] > time.monotonic()}
        self._ends = {study: self._ends[study] for study in self._held}
        content = {study: (lease.reader, lease.until) for study, lease in self._held.items()}
        try:
            write_durably(self._path, json.dumps(content))
        except OSError:
            logger.exception("leases are kept in memory only")


class Worklist:
    """All that is known of each study, without reading a CT."""

    def __init__(self, store: StudyStore, detections: Detections, leases: Leases) -> None:
        self.store = store
        self.leases = leases
        self._detections = detections
        # a state is made anew only when what it rests on is: thousands are looked at for every choice
        self._states: dict[str, tuple[ImageLabelModel, ImageFacts | None, Summary | None, StudyState]] = {}

    def rows(self) -> list[dict[str, object]]:
        """A line for every study, as the REST interface shows it."""
        model = self._detections.look()
        return [self._row(study, entry, model) for study, entry in self.store.entries().items()]

    def _row(self, study: str, entry: ImageLabelModel, model: str) -> dict[str, object]:
        facts = self.store.remembered_facts(study)
        known = review_of(entry)
        review = known.on(facts)
        reason = facts.reason if facts else self.store.not_examined(study)
        said = self._detections.summary(facts, model)
        label, version = self.store.label(study, entry), self.store.label_version(study, entry)
        labelled = review.state == "not_started" and bool(label) and version["label_revision"] is not None
        return {
            "study": study,
            "state": "labelled" if labelled else review.state,
            "reviewed": review.reviewed,
            "scheduled": len(facts.schedule) if facts else 0,
            "label": label,
            **version,
            "probability": said.probability if said else None,
            "model": said.model if said else None,
            "held_by": self.leases.holder(study) or None,
            "revision": review.revision,
            "usable": facts is None or not facts.reason,
            "reason": reason or (OUTDATED if known.is_outdated(facts) else ""),
            "outdated": known.is_outdated(facts),
            "status": said.status if said else None,
            "reasons": list(said.reasons) if said else [],
        }

    def details(self, study: str) -> dict[str, object]:
        """All that is known of one study; examines its CT if nobody did."""
        self.store.check_study(study)
        facts = self.store.facts(study)
        outdated = self.store.review_state(study).is_outdated(facts)
        annotation = None if outdated else self.store.labels.annotation_json(study)
        detection = self._detections.show(study)
        states = {entry["slice_index"]: entry["state"] for entry in annotation["slices"]} if annotation else {}
        whys: dict[int, str] = dict.fromkeys(states, "suspicious")
        whys |= {entry.slice_index: entry.why for entry in self.slices(study)}
        whys |= dict.fromkeys(facts.schedule, "schedule")
        schedule = [
            {"slice_index": index, "z_mm": facts.z_mm(index), "reviewed": states.get(index), "why": whys[index]}
            for index in sorted(whys)
        ]
        return {
            **self._row(study, self.store.entries()[study], self._detections.look()),
            "image": {"sha256": facts.sha256, "size": facts.size, "spacing_mm": facts.spacing_mm},
            "schedule": schedule,
            "annotation": annotation,
            "tag": self.store.review_state(study).tag,
            "detection": detection.to_json() if detection else None,
        }

    def states(self) -> list[StudyState]:
        """What the choice of the next study rests on."""
        model = self._detections.look()
        return [self._state(study, entry, model) for study, entry in self.store.entries().items()]

    def slices(self, study: str) -> tuple[SliceToReview, ...]:
        """The slices of a study still to look at."""
        facts = self.store.facts(study)
        outdated = self.store.review_state(study).is_outdated(facts)
        annotation = None if outdated else self.store.annotation(study)
        return slices_to_review(facts.schedule, self._detections.known(study), annotation)

    def _state(self, study: str, entry: ImageLabelModel, model: str) -> StudyState:
        facts = self.store.remembered_facts(study)
        said = self._detections.summary(facts, model)
        held_by = self.leases.holder(study)
        known = self._states.get(study)
        if known and known[0] is entry and known[1] is facts and known[2] is said:
            return known[3] if not held_by else replace(known[3], held_by=held_by)
        review = review_of(entry).on(facts)
        complete = review.state == "complete"  # also a stock client's final label, which has no reviewed slices
        scheduled = len(facts.schedule) if facts else 0
        state = StudyState(
            study=study,
            label=self.store.label(study, entry),
            reviewed=max(scheduled, 1) if complete else review.reviewed,
            scheduled=max(scheduled, 1) if complete else scheduled,
            embolism=review.embolism,
            probability=said.probability if said else None,
            strongest_slab=said.strongest_slab if said else None,
            usable=facts is None or not facts.reason,
        )
        self._states[study] = (entry, facts, said, state)
        return state if not held_by else replace(state, held_by=held_by)


@dataclass(frozen=True)
class NextWanted:
    """What a reader wants of the next study.

    Attributes:
        work: ``slices`` to review a schedule, ``labels`` to give a label to a study that has none.
        skip: studies that the reader does not want now.
        ahead: whether it is fetched while the reader is still at another one, which stays held.
    """

    work: Work = "slices"
    skip: frozenset[str] = frozenset()
    ahead: bool = False

    @classmethod
    def from_request(cls, request: Mapping[str, Any]) -> NextWanted:
        """From what a client sent.

        Raises:
            InputError: if a value is of another kind.
        """
        work, skip, ahead = (request.get(name) for name in ("work", "skip", "ahead"))
        if work not in (None, "slices", "labels"):
            raise InputError(f"work: expected slices or labels, got {work!r}")
        if skip is not None and not (isinstance(skip, list) and all(isinstance(name, str) for name in skip)):
            raise InputError("skip: expected a list of studies")
        return cls(work or "slices", frozenset(skip or ()), ahead is True)


class NextStudy(StrategyTask):
    """An active learning strategy: the study to read next, its slices, and a lease on it."""

    def __init__(self, strategy: Strategy, worklist: Worklist) -> None:
        super().__init__(_DESCRIPTIONS[strategy])
        self._strategy = strategy
        self._worklist = worklist
        self._rng = np.random.default_rng()

    def __call__(self, request: Mapping[str, Any], datastore: StudyStore) -> dict[str, object] | None:
        """The next study, or None when every study is complete, unusable or held by others."""
        said = request.get("reader") or request.get("client_id")
        reader = str(said) if said else f"{ANONYMOUS} {uuid.uuid4().hex[:6]}"
        wanted = NextWanted.from_request(request)
        states = self._worklist.states()
        found = self._first_free(states, reader, wanted)
        if found is None and not said:  # rather a study that an anonymous client looked at before than none
            for state in states:
                if state.held_by.startswith(ANONYMOUS):
                    self._worklist.leases.release(state.study, state.held_by)
            found = self._first_free([_freed(state) for state in states], reader, wanted)
        return found

    def _first_free(self, states: Sequence[StudyState], reader: str, wanted: NextWanted) -> dict[str, object] | None:
        left = [state for state in states if state.study not in wanted.skip]
        for state in rank_studies(self._strategy, left, self._rng, reader, work=wanted.work):
            facts = self._worklist.store.facts(state.study)  # examines a CT that is new; it may not be usable
            if facts.reason:
                continue
            try:
                lease = self._worklist.leases.take(state.study, reader, alone=not wanted.ahead)
            except Conflict:  # another reader asked at the same moment
                continue
            slices = [
                {"slice_index": entry.slice_index, "z_mm": facts.z_mm(entry.slice_index), "why": entry.why}
                for entry in self._worklist.slices(state.study)
            ]
            return {"id": state.study, "slices": slices, "lease_until": lease.to_json()["until"]}
        return None


def _freed(state: StudyState) -> StudyState:
    return replace(state, held_by="") if state.held_by.startswith(ANONYMOUS) else state
