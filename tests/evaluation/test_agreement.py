"""Agreement between readers, against the example of Cohen's paper and counts made by hand."""

import numpy as np
import pytest

from pe_app.annotation.record import ReviewedSlice
from pe_app.annotation.sparse import SparseAnnotation
from pe_app.evaluation.agreement import Read, agreement_page, compare_readers


def annotation(states, masks):
    slices = tuple(ReviewedSlice(k, 2.0 * k, state, "x") for k, state in states.items())
    return SparseAnnotation("a" * 64, (9, 4, 4), (2.0, 1.0, 1.0), slices, masks)


def test_kappa_of_a_table_worked_by_hand():
    # 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: p_o = 0.7, p_e = 0.5, kappa = 0.4
    pairs = [("positive", "positive")] * 20 + [("positive", "negative")] * 5
    pairs += [("negative", "positive")] * 10 + [("negative", "negative")] * 15
    reads = [Read(str(n), reader, pair[i]) for n, pair in enumerate(pairs) for i, reader in enumerate(("ann", "bo"))]
    (pair,) = compare_readers(reads)
    assert (pair.readers, pair.studies) == (("ann", "bo"), 50)
    assert pair.label_agreement == pytest.approx(0.7)
    assert pair.label_kappa == pytest.approx(0.4)


def test_slices_are_compared_where_both_looked_and_outlines_where_both_drew():
    square, half = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    square[:2, :2], half[:1, :2] = True, True
    ann = annotation({1: "none", 3: "embolism", 5: "uncertain"}, {3: square})
    bo = annotation({1: "none", 3: "embolism", 7: "none"}, {3: half})
    (pair,) = compare_readers([Read("s", "ann", "", ann), Read("s", "bo", "", bo)])
    assert (pair.slices, pair.slice_agreement, pair.outlined) == (2, 1.0, 1)
    assert pair.dice == pytest.approx(2 * 2 / (4 + 2))
    assert pair.slice_kappa == pytest.approx(1.0)
    assert (pair.studies, pair.label_kappa) == (0, None)


def test_readers_without_a_study_in_common_are_no_pair_and_one_label_for_all_has_no_kappa():
    assert compare_readers([Read("a", "ann", "positive"), Read("b", "bo", "positive")]) == ()
    (pair,) = compare_readers([Read("a", "ann", "positive", blind=True), Read("a", "bo", "positive")])
    assert (pair.label_agreement, pair.label_kappa, pair.blind) == (1.0, None, 0)


def test_the_page_escapes_names_and_carries_the_notice():
    (pair,) = compare_readers([Read("a", "<b>", "positive"), Read("a", "cy", "negative")])
    page = agreement_page([pair])
    assert "&lt;b&gt; and cy" in page
    assert "research" in page.lower()
