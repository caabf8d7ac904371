"""What each reader stated of each study, out of the versions of its labels."""

from __future__ import annotations

from collections.abc import Iterator

from pe_app.annotation.sparse import SparseAnnotation
from pe_app.evaluation.agreement import Read
from pe_app.studies import Label
from pe_monailabel.store.labels import ANNOTATION_LINE, STUDY_LABEL_LINE
from pe_monailabel.store.studies import StudyStore

LABELS: dict[object, Label] = {"positive": "positive", "negative": "negative", "uncertain": "uncertain"}


def reads_of(store: StudyStore) -> Iterator[Read]:
    """Of every study and reader the latest label, and the reader's own slices in the latest review."""
    for study in store.list_images():
        labels = _labels(store, study)
        reviews = _reviews(store, study)
        for reader in sorted({*labels, *reviews}):
            label, blind = labels.get(reader, ("", False))
            yield Read(study, reader, label, reviews.get(reader), blind)


def _labels(store: StudyStore, study: str) -> dict[str, tuple[Label, bool]]:
    found: dict[str, tuple[Label, bool]] = {}
    for version in store.history.versions(study, STUDY_LABEL_LINE):
        reader = str(version.info.get("reader") or "")
        if reader and reader not in found:
            found[reader] = LABELS.get(version.info.get("pe_label"), ""), version.info.get("blinded") is True
    return {reader: read for reader, read in found.items() if read[0]}


def _reviews(store: StudyStore, study: str) -> dict[str, SparseAnnotation]:
    found: dict[str, SparseAnnotation] = {}
    for version in store.history.versions(study, ANNOTATION_LINE):
        reader = str(version.info.get("reader") or "")
        if not version.annotated or not reader or reader in found:
            continue
        whole = SparseAnnotation.read(store.history.path(study, ANNOTATION_LINE, version.revision, ".json"))
        own = tuple(reviewed for reviewed in whole.slices if reviewed.reader == reader)
        masks = {reviewed.slice_index: whole.masks[reviewed.slice_index] for reviewed in own if reviewed.outlined}
        if own:
            found[reader] = SparseAnnotation(whole.image_sha256, whole.shape, whole.spacing_mm, own, masks)
    return found
