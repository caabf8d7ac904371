"""Detection: what the model says of the study and where it looked; candidates that the reader accepts or rejects."""

from __future__ import annotations

import functools
from typing import Callable, Optional

from slicer.i18n import tr as _

from PulmonaryEmbolismLib import images, plots
from PulmonaryEmbolismLib.answers import Candidate, Detection
from PulmonaryEmbolismLib.jobs import Cancelled, Job
from PulmonaryEmbolismLib.panel import forms
from PulmonaryEmbolismLib.proposals import candidate_region


class Detecting:
    def __init__(self, panel) -> None:
        self.panel = panel
        self.ui = ui = panel.ui
        self.detection: Optional[Detection] = None
        self.attention: Optional[images.Image] = None
        self.curve = plots.EvidenceCurve()
        self.curve.jump = panel.annotate.jump
        ui.curveFrame.layout().addWidget(self.curve)
        forms.set_up(ui.candidatesTable, 3)
        forms.on_click(
            [
                (ui.detectButton, self.detect),
                (ui.acceptButton, self.accept),
                (ui.rejectButton, self.reject),
                (ui.overlayButton, self.show_overlay),
            ]
        )
        ui.candidatesTable.connect("cellClicked(int,int)", lambda row, column: self.go_to_candidate())
        ui.opacitySlider.connect("valueChanged(double)", lambda value: self.show_overlay())
        ui.thresholdSlider.connect("valueChanged(double)", lambda value: self.show_overlay())

    # --- asking the model

    def detect(self) -> None:
        self._ask(_("Detecting"), self._detected)

    def _ask(self, text: str, done: Callable) -> None:
        """In the background; ``done(detection, attention)``. The server answers at once what it knows already."""
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
        """What the model says, in words, as a curve and as a list."""
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
        text = _("A new model is served: {model}. Detect again to hear what it says.")
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
        table, chosen = self.ui.candidatesTable, self.ui.candidatesTable.currentRow()
        words = [
            [str(c.rank), str(c.slice_index + 1), f"{c.z_mm:.0f}", c.place,
             "" if c.slab_probability is None else f"{c.slab_probability:.2f}", self._decision(c)]
            for c in candidates
        ]  # fmt: skip
        forms.fill(table, words, right=(0, 1, 2, 4))
        if 0 <= chosen < len(words):
            table.selectRow(chosen)
        self.curve.show_evidence(self.detection.evidence if self.detection else (), candidates, self._decision)

    def go_to_candidate(self) -> None:
        if self._candidate() is not None:
            self.panel.annotate.jump(self._candidate().slice_index)
        self.panel.enable()

    def accept(self) -> None:
        """Begin a region on the candidate's slice, added to what is painted there; the reader corrects it."""
        candidate = self._candidate()
        if candidate is not None and self.attention is None:
            self._fetch_attention(candidate)
        elif candidate is not None:
            self._accept(candidate)

    def _accept(self, candidate: Candidate) -> None:
        panel, annotate = self.panel, self.panel.annotate
        annotate.sync_paint()
        annotate.jump(candidate.slice_index)
        k, session = annotate.current(), panel.session
        hu = panel.nodes.hounsfield(k) if self.ui.clotButton.checked else None
        region = candidate_region(candidate, self.attention, session.shape, session.affine, hu)
        painted = session.masks.get(k)
        session.decide(candidate, "accepted", self.detection.model.sha256)
        session.paint(k, region if painted is None else region | painted)
        annotate.repaint(k)
        annotate.slice_moved()
        self.show_candidates()
        panel.say(_("Correct the region on slice {n}, then go on with N.").format(n=k + 1))

    def reject(self) -> None:
        candidate = self._candidate()
        if candidate is not None:
            self.panel.session.decide(candidate, "rejected", self.detection.model.sha256)
            self.panel.saving.keep()
            self.show_candidates()

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
