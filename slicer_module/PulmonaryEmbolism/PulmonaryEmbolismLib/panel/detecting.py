"""Detection: the model's result for the study and where it looked; candidates that the reader accepts or rejects."""

from __future__ import annotations

import functools
from typing import Callable, Optional

from slicer.i18n import tr as _

from PulmonaryEmbolismLib import images, plots
from PulmonaryEmbolismLib.answers import Candidate, Detection
from PulmonaryEmbolismLib.jobs import Cancelled, Job
from PulmonaryEmbolismLib.panel import forms
from PulmonaryEmbolismLib.proposals import candidate_region

WIDTHS = (40, 44, 50, 150, 50, 74)


class Detecting:
    def __init__(self, panel) -> None:
        self.panel = panel
        self.ui = ui = panel.ui
        self.detection: Optional[Detection] = None
        self.attention: Optional[images.Image] = None
        self.curve = plots.EvidenceCurve()
        self._selecting = False
        self.curve.jump = panel.safely(panel.annotate.jump)
        ui.curveFrame.layout().addWidget(self.curve)
        forms.set_up(ui.candidatesTable, WIDTHS, 3)
        panel.on_click(
            [
                (ui.detectButton, self.detect),
                (ui.acceptButton, self.accept),
                (ui.rejectButton, self.reject),
                (ui.overlayButton, self.show_overlay),
            ]
        )
        panel.connect(ui.candidatesTable, "cellClicked(int,int)", lambda row, column: self.go_to_candidate())
        panel.connect(ui.candidatesTable, "currentCellChanged(int,int,int,int)", self._chosen)
        panel.connect(ui.opacitySlider, "valueChanged(double)", lambda value: self.show_overlay())
        panel.connect(ui.thresholdSlider, "valueChanged(double)", lambda value: self.show_overlay())

    # --- asking the model

    def detect(self) -> None:
        if self.ui.detectButton.enabled:
            self._ask(_("Detecting"), self._detected)

    def _ask(self, text: str, done: Callable) -> None:
        """In the background; ``done(detection, attention)``. The server answers at once what it has computed before."""
        panel = self.panel
        client, study, folder = panel.client, panel.session.study, panel.cache / "attention"
        panel.runner.drop("detect")

        def work(job: Job):
            detection, path = client.detect(study, folder, job.report)
            attention = None
            if path is not None:
                attention = images.read_image(path)
                path.unlink()
            return detection, attention

        panel.runner.submit("detect", text, work, lambda found: done(*found), self._not_detected)
        panel.enable()

    def show(self, detection: Optional[Detection], attention: Optional[images.Image]) -> None:
        """The model's result in words, as a curve and as a list."""
        ui = self.ui
        self.detection, self.attention = detection, attention
        if attention is not None and detection is not None and not detection.refused:
            self.panel.nodes.show_attention(attention)
            self.panel.nodes.show_candidates(detection.candidates)
        self.show_overlay()
        ui.probabilityLabel.text = _probability_words(detection)
        ui.modelLabel.text = _("Model: {model}").format(model=self._dated(detection)) if detection else ""
        ui.reasonsLabel.text = "\n".join(f"• {reason}" for reason in detection.reasons) if detection else ""
        ui.modelLabel.visible = detection is not None
        ui.reasonsLabel.visible = bool(detection and detection.reasons)
        self.show_new_model()
        self.show_candidates()
        self.panel.enable()

    def forget(self) -> None:
        """The study was put away: nothing of it stays on the panel."""
        self.ui.overlayButton.checked = False
        self.show(None, None)

    def show_new_model(self) -> None:
        """Whether the model that spoke is no longer the one that is served."""
        detection, server = self.detection, self.panel.server
        old = detection is not None and detection.model.sha256 != server.model.sha256
        text = _("A new model is served: {model}. Detect again to update the detection.")
        self.ui.newModelLabel.text = text.format(model=server.model) if old else ""
        self.ui.newModelLabel.visible = old

    def enable(self) -> None:
        ui, is_open = self.ui, self.panel.session is not None
        ui.detectButton.enabled = is_open and not self.panel.runner.jobs("detect")
        ui.overlayButton.enabled = is_open and self.detection is not None and not self.detection.refused
        ui.opacitySlider.enabled = ui.thresholdSlider.enabled = self.attention is not None
        ui.acceptButton.enabled = ui.rejectButton.enabled = is_open and self._candidate() is not None

    def _detected(self, detection: Detection, attention: Optional[images.Image]) -> None:
        self.ui.overlayButton.checked = False
        self.show(detection, attention)
        self.panel.worklist.refresh()

    def _fetch_attention(self, accepted: Optional[Candidate] = None) -> None:
        """The attention of a detection of an earlier day; then accept a candidate that waits for it."""
        self._ask(_("Loading the attention"), functools.partial(self._fetched, accepted))

    def _fetched(self, accepted: Optional[Candidate], detection: Detection, attention: Optional[images.Image]) -> None:
        self.ui.overlayButton.checked = self.ui.overlayButton.checked and attention is not None
        self.show(detection, attention)
        if attention is not None and accepted in detection.candidates:
            self._accept(accepted)

    def _not_detected(self, error: Exception) -> None:
        self.ui.overlayButton.checked = self.ui.overlayButton.checked and self.attention is not None
        self.panel.say(_("The detection was cancelled.") if isinstance(error, Cancelled) else error)
        self.panel.enable()

    def _dated(self, detection: Detection):
        """The model that spoke; its date from the server where it is the one still served."""
        model, served = detection.model, self.panel.server.model
        return served if not model.date and model.sha256 == served.sha256 else model

    # --- candidates

    def show_candidates(self) -> None:
        candidates = self.detection.candidates if self.detection else ()
        table = self.ui.candidatesTable
        words = [
            [str(c.rank), str(c.slice_index + 1), f"{c.z_mm:.0f}", c.place,
             "" if c.slab_probability is None else f"{c.slab_probability:.2f}", self._decision(c)]
            for c in candidates
        ]  # fmt: skip
        self._selecting = True
        forms.fill(table, words, right=(0, 1, 2, 4))
        self._selecting = False
        self.curve.show_evidence(self.detection.evidence if self.detection else (), candidates, self._decision)

    def go_to_candidate(self) -> None:
        """All views on the chosen candidate."""
        candidate, views = self._candidate(), self.panel.views
        if candidate is not None:
            self.panel.nodes.centre(views.all(), candidate.slice_index, candidate.centre_lps_mm)
        self.panel.enable()

    def step_candidate(self, direction: int) -> None:
        """The next candidate of the list (1) or the one before (-1), centred in all views."""
        count = len(self.detection.candidates) if self.detection else 0
        if not count or self.panel.session is None:
            self.panel.say(_("There are no candidates to go to; detect first."))
            return
        row = self.ui.candidatesTable.currentRow()
        self.ui.candidatesTable.setCurrentCell((row + direction) % count if row >= 0 else 0, 0)
        self.go_to_candidate()

    def _chosen(self, row: int, _column: int, _from_row: int, _from_column: int) -> None:
        if not self._selecting and row >= 0 and self.panel.nodes is not None:
            self.go_to_candidate()

    def accept(self) -> None:
        """Begin a region on the candidate's slice, added to what is painted there; the reader corrects it."""
        candidate = self._candidate()
        if candidate is not None and self.attention is None:
            self._fetch_attention(candidate)
        elif candidate is not None:
            self._accept(candidate)

    def _accept(self, candidate: Candidate) -> None:
        panel, annotate, model = self.panel, self.panel.annotate, self.detection.model.sha256
        annotate.sync_paint()
        annotate.jump(candidate.slice_index)
        k, session = annotate.current(), panel.session
        within = panel.painting.in_clot_range(k) if self.ui.clotButton.checked else None
        region = candidate_region(candidate, self.attention, session.shape, session.affine, within)

        def change(session) -> None:
            painted = session.masks.get(k)
            session.set_mask(k, region if painted is None else region | painted)
            session.decide(candidate, "accepted", model)

        annotate.edit(change)
        annotate.slice_moved()
        panel.say(_("Correct the region on slice {n}, then go on with N.").format(n=k + 1))

    def reject(self) -> None:
        candidate = self._candidate()
        if candidate is not None:
            model = self.detection.model.sha256
            self.panel.annotate.edit(lambda session: session.decide(candidate, "rejected", model))

    def _candidate(self) -> Optional[Candidate]:
        index = self.ui.candidatesTable.currentRow()
        candidates = self.detection.candidates if self.detection else ()
        return candidates[index] if 0 <= index < len(candidates) else None

    def _decision(self, candidate: Candidate) -> str:
        session = self.panel.session
        return session.decision(candidate, self.detection.model.sha256) if session else ""

    # --- overlay

    def toggle_overlay(self) -> None:
        if self.ui.overlayButton.enabled:
            self.ui.overlayButton.checked = not self.ui.overlayButton.checked
            self.show_overlay()

    def show_overlay(self) -> None:
        nodes, ui = self.panel.nodes, self.ui
        if nodes is None:
            return
        if ui.overlayButton.checked and self.attention is None and not self.panel.runner.jobs("detect"):
            self._fetch_attention()
        nodes.set_overlay(ui.overlayButton.checked, ui.opacitySlider.value, ui.thresholdSlider.value)


def _probability_words(detection: Optional[Detection]) -> str:
    if detection is None:
        return ""
    if detection.refused or detection.probability is None:
        return _("Not analysed")
    text = _("P(PE) {p:.2f}").format(p=detection.probability)
    if detection.threshold is None:
        return text
    above = detection.probability >= detection.threshold
    words = _("above the threshold {t:.2f}") if above else _("below the threshold {t:.2f}")
    colour = plots.STATE_COLOURS["embolism" if above else "none"]
    return f'<span style="color: {colour}">●</span> {text}, {words.format(t=detection.threshold)}'
