"""The verb label-reports: study labels from radiology reports."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pe_app.cli.options import progress_bars
from pe_app.common.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pe_app.reports.report_labels import ReportLabel


def label_reports(
    reports: Annotated[Path, typer.Argument(help="CSV with the column report, and study, accession, study_uid, or "
                                                 "patient and date.")],
    out: Annotated[Path, typer.Option(help="CSV of study, label, deciding sentence, location, side, acuity.")],
    studies: Annotated[Path | None, typer.Option(help="Study list to fill in: labels that are there stay.")] = None,
    key: Annotated[Path | None, typer.Option(help="Key of a de-identified import, by which true accession numbers find "
                                                  "their pseudonyms in the study list.")] = None,
) -> None:  # fmt: skip
    """Mine study labels from radiology reports: positive, negative or uncertain, with the sentence that decided."""
    from dataclasses import replace

    from pe_app.pacs.importing import Pseudonyms, read_key
    from pe_app.reports.label_files import join_labels, label_studies, pseudonym_of, write_labels
    from pe_app.reports.label_files import label_reports as label
    from pe_app.studies import read_studies, write_studies

    if key and not studies:
        raise InputError("--key finds studies in a de-identified study list: give it with --studies")
    known = read_studies(studies) if studies else ()
    with progress_bars() as progress:
        labelled = label(reports, out, progress)
    _show_labels([one.found for one in labelled], out)
    if not studies:
        return
    pseudonyms = Pseudonyms(read_key(key, studies.parent, make=False)) if key else None
    joined = join_labels(labelled, known, (lambda one: pseudonym_of(one, pseudonyms)) if pseudonyms else None)
    ids = joined.studies
    write_labels([replace(one, key=one.key._replace(study=ids.get(one.place, ""))) for one in labelled], out)
    done = label_studies(known, joined.labels)
    write_studies(done, studies)
    gained = sum(new.label != old.label for new, old in zip(done, known, strict=True))
    typer.echo(
        f"{len(joined.labels)} of {len(labelled)} reports belong to a study of {studies}; "
        f"{gained} of {len(known)} studies got a label"
    )
    _list_some("reports belong to no study of the list", [f"{one.place} ({one.key})" for one in joined.unmatched])
    _list_some("reports may belong to several studies", [f"{one.place} ({one.key})" for one in joined.ambiguous])
    _list_some("studies have no report", joined.without_report)


NAMED = 10
"""Items listed of those that did not match."""


def _list_some(what: str, names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        typer.echo(f"{len(names)} {what}: {', '.join(names[:NAMED])}{more}", err=True)


def _show_labels(found: Sequence[ReportLabel], out: Path) -> None:
    """How many reports got each label, and how many were not read or mention nothing that the rules know."""
    from collections import Counter

    counts = Counter(one.label for one in found)
    typer.echo(", ".join(f"{counts[label]} {label}" for label in ("positive", "negative", "uncertain")) + f": {out}")
    unread = Counter(one.unread for one in found if one.unread)
    for language, count in unread.most_common():
        typer.echo(f"{count} of {len(found)} reports were not read, the rules know English only: {language}", err=True)
    silent = sum(not one.sentence and not one.unread for one in found)
    if silent:
        typer.echo(
            f"{silent} of {len(found)} reports ({silent / len(found):.0%}) mention nothing that the rules know; they "
            "are uncertain and label no study",
            err=True,
        )
