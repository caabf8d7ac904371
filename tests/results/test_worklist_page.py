"""The worklist page: the order, the share, the reasons, and that no name becomes part of the page's code."""

import html.parser
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pe_app.common.errors import InputError
from pe_app.ct.quality import Reason
from pe_app.model.detection import Candidate, Detection, Evidence, ExtentEstimate, ImageIdentity, ModelIdentity
from pe_app.results.outcome import Outcome, Share, by_probability
from pe_app.results.worklist_page import worklist_page

DEMO = Reason("demo_model", "Model 'm' has never seen a real embolism.", refuses=False)
UNTRAINED = Reason("untrained_model", "Neither stage is trained in model 'm'.", refuses=False)
CONTRAST = Reason("no_contrast", "the brightest blood has 43 HU", refuses=True)


def analysed(study: str, probability: float | None, *reasons: Reason, model: str = "m") -> Outcome:
    evidence = tuple(
        Evidence(k, 5.0 * k, 2 * k, float(p), 1.0, None) for k, p in enumerate(np.linspace(0.1, 0.9, 20).round(4))
    )
    candidate = Candidate(
        1, 95.0, 38, (0.0, 0.0, 95.0), (22.0, 11.0, 5.0), 1.0, 0.9, 22.0, (36, 38), 2.5, "left", "peripheral"
    )
    refused = probability is None
    detection = Detection(
        "refused" if refused else "analysed",
        reasons,
        probability,
        0.5,
        () if refused else evidence,
        () if refused else (candidate,),
        ImageIdentity((40, 64, 64), (2.5, 1.0, 1.0), "ab" * 32),
        ModelIdentity(model, "1", "cd" * 32, trained=True),
        extent_estimate=None if refused else ExtentEstimate(2.5, 0.1),
    )
    message = "; ".join(reason.message for reason in reasons if reason.refuses)
    date = "2026-01-02T03:04:05+00:00"
    return Outcome(study, detection.status, message, detection, folder=study, pictured=(38, 20, 4), date=date)


def failed(study: str, message: str = "cut off") -> Outcome:
    return Outcome(study, "failed", message, date="2026-01-02T03:04:05+00:00")


class Page(html.parser.HTMLParser):
    """What a browser would see: the tags, and the words outside of script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._code = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._code = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._code = False

    def handle_data(self, data):
        self.words += "" if self._code else data

    def articles(self) -> list[str]:
        """Names of the studies, in the page's order."""
        return [attrs["data-name"] for tag, attrs in self.tags if tag == "article"]

    def classes(self) -> list[str]:
        return [attrs["class"] for tag, attrs in self.tags if tag == "article"]


def test_the_most_suspicious_study_is_first_and_those_without_a_number_are_last():
    outcomes = [analysed("low", 0.1), failed("zz"), analysed("high", 0.9), analysed("no", None, CONTRAST)]
    page = Page(worklist_page(outcomes, Path("nowhere")))
    assert page.articles() == ["high", "low", "no", "zz"]
    assert page.classes() == ["above", "below", "none", "none"]
    assert [outcome.study for outcome in by_probability(outcomes)] == ["high", "low", "no", "zz"]


def test_the_share_analysed_stands_at_the_top_and_is_rounded_down():
    outcomes = [analysed(f"a{k}", 0.2) for k in range(37)] + [failed(f"f{k}") for k in range(3)]
    assert str(Share.of(outcomes)) == "37 of 40 analysed (92%)"
    assert "37 of 40 analysed (92%)" in Page(worklist_page(outcomes, Path("nowhere"))).words
    assert str(Share.of(outcomes[:3], 18)) == "3 of 18 analysed (16%)", "those that wait are not analysed"
    assert str(Share(199, 0, 1)) == "199 of 200 analysed (99%)"  # never 100% while one is missing
    assert Share.of(outcomes[:10], total=40).details == "30 waiting"


def test_every_study_without_a_number_says_why_in_words():
    page = Page(worklist_page([analysed("no", None, CONTRAST), failed("cut", "scan.nrrd: cut off")], Path("nowhere")))
    assert "the brightest blood has 43 HU" in page.words
    assert "scan.nrrd: cut off" in page.words
    assert "2 studies were not analysed: read them without the program" in page.words


@pytest.mark.parametrize(("reason", "title"), [(DEMO, "Demonstration model"), (UNTRAINED, "Untrained model")])
def test_numbers_of_a_model_that_knows_nothing_are_marked_at_the_top_and_at_every_study(reason, title):
    page = Page(worklist_page([analysed("a", 0.97, reason), analysed("b", 0.2, reason)], Path("nowhere")))
    assert f"{title}: not a clinical result." in page.words
    assert reason.message in page.words
    assert page.classes() == ["above not-clinical", "below not-clinical"]
    assert page.words.count(title) == 3
    assert "Suspicious" not in page.words


def test_where_to_look_is_told_with_side_level_and_size():
    page = Page(worklist_page([analysed("a", 0.97)], Path("nowhere")))
    assert "slice 39 of 40 from the feet, left, peripheral" in page.words
    assert "Extent estimate 2 ml" in page.words
    assert "not a clot burden" in page.words


def test_another_model_than_the_pages_is_named_at_its_study():
    outcomes = [analysed("a", 0.9), analysed("b", 0.8), analysed("c", 0.7, model="older")]
    page = Page(worklist_page(outcomes, Path("nowhere")))
    assert page.words.count("By another model: older 1") == 1


def test_the_page_holds_its_pictures_and_loads_nothing(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (30, 10), (200, 30, 20)).save(tmp_path / "a" / "thumbnails.jpg")
    text = worklist_page([analysed("a", 0.9), analysed("without", 0.8)], tmp_path)
    page = Page(text)
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(sources) == 1
    assert sources[0].startswith("data:image/jpeg;base64,")
    assert "slice 39 of 40" in page.words
    assert not re.search(r"(src|href)=\"(https?:)?//", text)
    assert not re.search(r"url\(|@import", text)
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert links == ["a/index.html", "without/index.html"]


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{name}",
    "a&b",
    "</script><b>",
    "' onclick='x",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_reason_or_model_becomes_code(name):
    outcomes = [
        replace(analysed(name, 0.9, Reason("weak", name, refuses=False), model=name), folder=name, problem=name),
        failed(name, name),
    ]
    usual = Page(worklist_page([analysed("x", 0.9, Reason("w", "y", refuses=False)), failed("z")], Path("nowhere")))
    page = Page(worklist_page(outcomes, Path("nowhere")))
    known = {tag for tag, _ in usual.tags} | {"p"}
    assert {tag for tag, _ in page.tags} <= known
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert name in page.words
    assert page.articles() == [name.lower()] * 2


def test_an_outcome_survives_the_way_through_its_line():
    for outcome in (analysed("a", 0.7, DEMO), analysed("no", None, CONTRAST), failed("f")):
        line = json.dumps(outcome.to_json(), allow_nan=False)
        assert Outcome.from_json(json.loads(line)) == outcome


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({}, "result: unknown schema None, expected 'pe-result/1'"),
        ({"schema": "pe-result/9"}, "result: schema 'pe-result/9' is newer"),
        ({"schema": "pe-result/1", "pictured": []}, "result: study is missing"),
        ({**failed("f").to_json(), "detection": {"schema": "pe-detection/3"}}, "'pe-detection/3' is newer"),
    ],
)
def test_a_line_that_is_none_is_refused(broken, message):
    with pytest.raises(InputError, match=message):
        Outcome.from_json(broken)


def test_in_a_browser_the_filters_show_what_they_say_and_no_other_script_runs(tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium at hand")
    outcomes = [analysed("high", 0.9), analysed("low", 0.1), failed("<script>document.title='broken'</script>")]
    text = worklist_page(outcomes, tmp_path)
    shown = {}
    for value in ("all", "above", "none"):
        chosen = text.replace(" checked", "").replace(f'value="{value}"', f'value="{value}" checked')
        (tmp_path / "page.html").write_text(chosen)
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        done = subprocess.run(
            [*command, "--dump-dom", (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=200
        )
        page = Page(done.stdout)
        shown[value] = [
            attrs["data-name"][:4] for tag, attrs in page.tags if tag == "article" and "hidden" not in attrs
        ]
        assert "<title>Worklist</title>" in done.stdout
    assert shown == {"all": ["high", "low", "<scr"], "above": ["high"], "none": ["<scr"]}
