"""Reports as hospitals' systems hand them out, read as a person reads them."""

import time

import pytest

from pe_app.reports.decoding import plain_text
from pe_app.reports.language import other_language
from pe_app.reports.report_labels import label_report

DRESSED = [
    ("negative", "PE present? Y/N: N"),
    ("positive", "PE present? Y/N: Y"),
    ("positive", "PE present (Y/N)? Yes"),
    ("uncertain", "PE present? Y/N"),
    ("negative", "Pulmonary embolism: [ ] Yes [x] No"),
    ("positive", "Pulmonary embolism: [x] Yes [ ] No"),
    ("negative", "Pulmonary embolism: Yes [ ] No [x]"),
    ("positive", "Pulmonary embolism: Yes [X] No [ ]"),
    ("negative", "Pulmonary embolism  ☐ yes  ☒ no"),
    ("positive", "☑ Pulmonary embolism\n☐ Pneumonia\n☐ No acute abnormality"),
    ("uncertain", "☐ Pulmonary embolism\n☑ Pneumonia"),
    ("negative", "( ) Acute PE\n(X) No acute PE"),
    ("negative", "| Finding | Result |\n|---|---|\n| Pulmonary embolism | None |\n| Effusion | Small |"),
    ("positive", "| Pulmonary embolism | Left lower lobe segmental |"),
    ("negative", "Pulmonary embolism .......... no"),
    ("negative", "Pulmonary embolism          None"),
    (
        "negative",
        "{\\rtf1\\ansi{\\fonttbl{\\f0 Arial;}}\\f0\\fs20 "
        "HISTORY: PE 2019.\\par IMPRESSION:\\par No evidence of\\~pulmonary embolism.\\par}",
    ),
    (
        "positive",
        "{\\rtf1\\ansi\\deff0{\\fonttbl{\\f0 Arial;}}{\\b IMPRESSION:}\\par\n"
        "Acute pulmonary emboli in both lower lobes\\'2e\\par}",
    ),
    ("negative", "IMPRESSION:\\nNo pulmonary embolism.\\n"),
    ("negative", "HISTORY: PE_x000D_\nIMPRESSION: No PE_x000D_\n"),
    ("negative", "&lt;p&gt;HISTORY: PE&lt;/p&gt;&lt;p&gt;IMPRESSION: No&amp;nbsp;PE.&lt;/p&gt;"),
    (
        "negative",
        "<html><head><style>p{color:red}</style></head>"
        "<body><b>Impression:</b><br/>No <i>acute</i> pulmonary embolism.<br></body></html>",
    ),
    ("negative", "<li>No pulmonary\nembolism.</li><li>Small effusion</li>"),
    ("positive", "IMPRESSION: A 3 mm nodule (<5 mm). Acute PE, RV/LV >1."),
    ("negative", "Impression: ~5 mm nodule. No PE."),
    ("negative", "IMPRESSION:\nNo intraluminal ﬁlling defect in the pulmonary arteries."),
    ("positive", "IMPRESSION: Intraluminal ﬁlling defect in the right lower lobe pulmonary artery."),
    ("negative", "IMPRESION: No PE.\nFINDNGS: ok"),
    ("negative", "CLINICAL: PE?\rIMPRESSION: No pulmonary emb\xadolism."),
]

ABBREVIATED = [
    ("uncertain", "PE: General: no acute distress. Lungs clear."),
    ("negative", "Physical exam (PE) normal. CT: no pulmonary embolism."),
    ("positive", "Pleural effusion (PE) on the left. Pulmonary embolism (PE) in the right lower lobe."),
    ("uncertain", "IMPRESSION: Bilateral PE (pleural effusions), unchanged."),
    ("uncertain", "IMPRESSION: Small pericardial effusion (PE). PE has increased since the last study."),
]

EXPLAINED = [
    ("positive", "IMPRESSION: Fresh embolus in the left lower lobe artery on top of chronic thromboembolic disease."),
    ("positive", "New filling defects on top of known chronic emboli in the right lung."),
    ("positive", "IMPRESSION: Acute PE on a background of chronic webs."),
    ("positive", "Chronic thromboembolic disease with a fresh embolus in the right lower lobe."),
    ("positive", "Acute-on-chronic pulmonary embolism."),
    ("positive", "Known CTEPH, now with superimposed new segmental embolus in the left lower lobe."),
    (
        "negative",
        "Filling defect in the right main pulmonary artery that enhances and is most consistent with an angiosarcoma.",
    ),
    ("negative", "Large filling defect in the left pulmonary artery, a primary sarcoma rather than thrombus."),
    ("negative", "Lobulated filling defect in the right pulmonary artery, biopsy-proven intimal sarcoma."),
    ("negative", "Filling defects in segmental arteries represent tumor thrombus from renal cell carcinoma."),
    ("negative", "Beaded filling defects in the subsegmental arteries, in keeping with tumour emboli."),
    ("negative", "High density filling defects in the right lower lobe arteries due to cement after vertebroplasty."),
    ("negative", "Linear dense filling defect in the segmental artery is embolized cement from kyphoplasty."),
    (
        "uncertain",
        "It is difficult to determine whether the filling defect in the right lower lobe is acute or artifact.",
    ),
    ("uncertain", "Difficult to determine whether there is a pulmonary embolism in the lingula."),
    ("uncertain", "It is hard to tell if this is a true embolus in the right lower lobe."),
    ("uncertain", "Linear defect in the right lower lobe artery, acute embolus versus chronic web."),
    ("uncertain", "Small filling defect in the left lower lobe artery: embolus vs. chronic web."),
    ("uncertain", "Subsegmental filling defect may be embolus versus chronic web versus mixing artifact."),
    ("negative", "Chronic web in the right lower lobe artery, no acute embolus."),
]

FOREIGN = [
    ("German", "Kein Nachweis einer Lungenembolie."),
    ("German", "Keine Embolie."),
    ("French", "Pas d'embolie pulmonaire."),
    ("Italian", "Assenza di embolia polmonare."),
    ("German", "Beurteilung: Zentrale Embolie rechts. Pleuraerguss links."),
    ("not in Latin script", "Нет признаков тромбоэмболии легочной артерии."),
    ("not in Latin script", "肺栓塞を認めない。両肺に異常なし。"),
    ("Spanish", "No se observan defectos de repleción. No hay embolia pulmonar."),
    ("Dutch", "Geen aanwijzingen voor longembolie."),
]


@pytest.mark.parametrize(("label", "text"), DRESSED, ids=lambda value: value[:40])
def test_markup_tables_and_tick_boxes_do_not_change_the_label(label, text):
    assert label_report(text).label == label


@pytest.mark.parametrize(("label", "text"), ABBREVIATED, ids=lambda value: value[:40])
def test_pe_is_what_the_report_defines_it_as(label, text):
    found = label_report(text)
    assert found.label == label
    assert found.sentence.isprintable()


@pytest.mark.parametrize(("label", "text"), EXPLAINED, ids=lambda value: value[:40])
def test_fresh_on_top_of_chronic_and_defects_explained_afterwards(label, text):
    assert label_report(text).label == label


@pytest.mark.parametrize(("language", "text"), FOREIGN, ids=lambda value: value[:40])
def test_a_report_in_another_language_is_said_to_be_unread(language, text):
    found = label_report(text)
    assert (found.label, found.sentence, found.unread) == ("uncertain", "", language)


@pytest.mark.parametrize(
    "text", ["", "PE", "Acute LE clot and PE.", "No PE. Discussed with Dr. van der Berg.", "Saddle embolus."]
)
def test_short_english_is_english(text):
    assert other_language(text) == ""


def test_the_deciding_sentence_is_written_as_in_the_report_without_its_markup():
    found = label_report("<p>IMPRESSION:</p><p>Acute&nbsp;PE in the <b>right</b> lower lobe&#46;</p>")
    assert found.sentence == "Acute PE in the right lower lobe."


@pytest.mark.parametrize(
    "text",
    [
        "A nodule of < 5 mm, RV/LV > 1, p<0.05.",
        "Seen ~5 mm from the carina, and ~ 3 cm above.",
        "Discussed at 12:30 with R&D; AT&T; see image 4/81.",
        "Nodule measures [ ] mm in the right lung.",
    ],
)
def test_plain_text_stays_as_it_is(text):
    assert plain_text(text) == text


@pytest.mark.parametrize("words", ["[ ] ", "<p", "&amp;", "{\\rtf1", "| ", "~", "a\t", "....", "(PE) "])
def test_no_markup_takes_for_ever(words):
    start = time.process_time()
    label_report(words * 5000)
    label_report("{\\rtf1 " + words * 5000)
    assert time.process_time() - start < 5
