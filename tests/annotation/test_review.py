from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pe_app.annotation.review import STRATEGIES, SliceToReview, StudyState, disagreement, rank_studies, slices_to_review
from pe_app.annotation.sparse import ReviewedSlice, SparseAnnotation
from pe_app.model.detection import Detection, Evidence, ImageIdentity, ModelIdentity

RNG = np.random.default_rng


def order(strategy, states, **settings) -> list[str]:
    return [state.study for state in rank_studies(strategy, states, RNG(0), **settings)]


def detection(*slabs: tuple[int, float]) -> Detection:
    evidence = tuple(Evidence(n, float(index), index, p, 0.0, None) for n, (index, p) in enumerate(slabs))
    image = ImageIdentity((100, 4, 4), (1.0, 1.0, 1.0), "0" * 64)
    return Detection("analysed", (), 0.5, 0.5, evidence, (), image, ModelIdentity("m", "1", "0" * 64, True))


def annotation(*slices: int) -> SparseAnnotation:
    reviewed = tuple(ReviewedSlice(index, float(index), "none") for index in slices)
    return SparseAnnotation("0" * 64, (100, 4, 4), (1.0, 1.0, 1.0), reviewed, {})


PROBABILITIES = st.none() | st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
STATES = st.lists(
    st.builds(
        StudyState,
        study=st.text("abc", min_size=1, max_size=3),
        label=st.sampled_from(["positive", "negative", "uncertain", ""]),
        reviewed=st.integers(0, 3),
        scheduled=st.integers(0, 3),
        embolism=st.booleans(),
        probability=PROBABILITIES,
        strongest_slab=PROBABILITIES,
        held_by=st.sampled_from(["", "me", "you"]),
        usable=st.booleans(),
    ),
    unique_by=lambda state: state.study,
    max_size=8,
)


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(deadline=None, max_examples=60)
@given(states=STATES, data=st.data())
def test_the_pool_is_what_this_reader_can_go_on_with_in_an_order_that_the_list_does_not_change(strategy, states, data):
    ranked = order(strategy, states, reader="me")
    pool = set()
    for state in states:
        done = state.scheduled > 0 and state.reviewed >= state.scheduled
        if state.usable and not done and state.held_by != "you":
            pool.add(state.study)
    assert len(ranked) == len(pool)
    assert set(ranked) == pool
    assert order(strategy, data.draw(st.permutations(states)), reader="me") == ranked


def test_one_reviewed_slice_does_not_take_a_study_out_of_the_pool():
    states = [StudyState("a", reviewed=1, scheduled=20), StudyState("b", reviewed=20, scheduled=20)]
    assert order("next_unreviewed", states) == ["a"]


def test_next_unreviewed_finishes_what_was_begun():
    states = [StudyState("a", scheduled=9), StudyState("c", reviewed=2, scheduled=9), StudyState("b", reviewed=1)]
    assert order("next_unreviewed", states) == ["b", "c", "a"]


def test_a_study_held_by_another_reader_is_passed_over():
    states = [StudyState("a", held_by="AB"), StudyState("b", held_by="CD"), StudyState("c")]
    assert order("next_unreviewed", states, reader="CD") == ["b", "c"]
    assert order("next_unreviewed", states) == ["c"]


@settings(deadline=None)
@given(STATES, st.sampled_from([0.3, 0.5]))
def test_most_uncertain_is_nearest_the_threshold_against_brute_force(states, threshold):
    pool = {state.study: state for state in states}
    ranked = [pool[study] for study in order("most_uncertain", states, reader="me", threshold=threshold)]
    for first, second in itertools.pairwise(ranked):
        if first.probability is None:
            assert second.probability is None
            assert first.study < second.study
        elif second.probability is not None:
            one, two = abs(first.probability - threshold), abs(second.probability - threshold)
            assert one < two or (one == two and first.study < second.study)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (StudyState("x", probability=0.9), 0.0),
        (StudyState("x", probability=0.25, strongest_slab=1.0), 0.75),
        (StudyState("x", probability=0.75, strongest_slab=0.75, label="negative"), 0.75),
        (StudyState("x", probability=0.25, label="positive"), 0.75),
        (StudyState("x", probability=0.25, label="uncertain"), 0.0),
        (StudyState("x", probability=0.25, label="negative", embolism=True), 0.75),
        (StudyState("x", probability=0.75, label="positive", reviewed=5, scheduled=9), 0.25),
        (StudyState("x", label="positive", strongest_slab=0.9), -1.0),
    ],
)
def test_disagreement_by_hand(state, expected):
    assert disagreement(state) == expected


def test_disagreement_ranks_contradictions_first_and_unseen_studies_last():
    states = [
        StudyState("unseen", label="positive"),
        StudyState("agrees", label="positive", probability=1.0, strongest_slab=1.0),
        StudyState("missed", label="positive", probability=0.1),
        StudyState("stages", probability=0.2, strongest_slab=0.9),
    ]
    assert order("disagreement", states) == ["missed", "stages", "agrees", "unseen"]


def test_random_is_a_permutation_of_the_generator_and_uniform():
    states = [StudyState(study) for study in "abc"]
    assert order("random", states) == order("random", states)
    rng = RNG(1)
    first = [rank_studies("random", states, rng)[0].study for _ in range(3000)]
    assert all(abs(first.count(study) / 3000 - 1 / 3) < 0.04 for study in "abc")


def test_an_unknown_strategy_is_a_programmers_mistake():
    with pytest.raises(ValueError, match="unknown strategy 'best'"):
        rank_studies("best", [], RNG(0))  # type: ignore[arg-type]


# slices


def test_open_slices_of_the_schedule_come_with_the_most_suspicious_others():
    found = detection((5, 0.1), (10, 0.99), (15, 0.8), (25, 0.9), (35, 0.2), (45, 0.85))
    assert slices_to_review((10, 20, 30), found, annotation(20, 25), extra=2) == (
        SliceToReview(10, "schedule"),
        SliceToReview(15, "suspicious"),
        SliceToReview(30, "schedule"),
        SliceToReview(45, "suspicious"),
    )


def test_without_detection_and_annotation_the_schedule_is_reviewed():
    assert [entry.slice_index for entry in slices_to_review((3, 6), None, None)] == [3, 6]
    assert slices_to_review((3,), detection((4, 0.9)), None, extra=0) == (SliceToReview(3, "schedule"),)
    refused = replace(detection(), status="refused", probability=None)
    assert slices_to_review((3,), refused, annotation(3)) == ()


@settings(deadline=None)
@given(
    st.sets(st.integers(0, 12), max_size=5),
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from([0.1, 0.5, 0.9])), max_size=10),
    st.sets(st.integers(0, 12), max_size=6),
    st.integers(0, 4),
)
def test_slices_to_review_against_brute_force(schedule, slabs, reviewed, extra):
    chosen = slices_to_review(sorted(schedule), detection(*slabs), annotation(*reviewed), extra)
    indices = [entry.slice_index for entry in chosen]
    assert indices == sorted(set(indices))
    assert {entry.slice_index for entry in chosen if entry.why == "schedule"} == schedule - reviewed
    suspicious = {entry.slice_index for entry in chosen if entry.why == "suspicious"}
    strongest = {
        index: max(p for other, p in slabs if other == index) for index, _ in slabs if index not in schedule | reviewed
    }
    assert suspicious <= strongest.keys()
    assert len(suspicious) == min(extra, len(strongest))
    for left in strongest.keys() - suspicious:
        for taken in suspicious:
            assert (strongest[taken], -taken) > (strongest[left], -left)


def test_a_reader_of_labels_gets_studies_without_one_and_a_reader_of_slices_both():
    states = [StudyState("a", label="positive", scheduled=3), StudyState("b", scheduled=3)]
    for strategy in STRATEGIES:
        ranked = rank_studies(strategy, states, RNG(0), work="labels")
        assert [state.study for state in ranked] == ["b"]
        assert len(rank_studies(strategy, states, RNG(0))) == 2
