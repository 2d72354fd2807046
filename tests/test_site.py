from __future__ import annotations

import numpy as np
import pytest

from core.evaluation.site import openbhb_score, site_balanced_accuracy


def embeddings_of(sites: np.ndarray, told: bool, seed: int = 0) -> np.ndarray:
    """Noise, with the site's number written into the first feature if `told`."""
    noise = np.random.default_rng(seed).normal(size=(len(sites), 6))
    noise[:, 0] += 8.0 * np.unique(sites, return_inverse=True)[1] * told
    return noise


TRAINING = np.repeat(["alpha", "beta", "gamma"], [20, 12, 8])
EVALUATION = np.repeat(["alpha", "beta", "gamma"], [12, 6, 6])


@pytest.mark.parametrize("reference", [False, True])
def test_sites_that_are_written_into_embeddings_are_found(reference: bool) -> None:
    accuracy = site_balanced_accuracy(
        embeddings_of(TRAINING, told=True),
        TRAINING,
        embeddings_of(EVALUATION, told=True, seed=1),
        EVALUATION,
        reference=reference,
    )
    assert accuracy is not None
    assert accuracy > 0.95


def test_accuracy_is_balanced_over_sites() -> None:
    # Evaluation subjects all look like alpha: right for 12 of 24 subjects, but for one site of three.
    like_alpha = embeddings_of(TRAINING, told=True)[:1].repeat(24, axis=0)
    accuracy = site_balanced_accuracy(embeddings_of(TRAINING, told=True), TRAINING, like_alpha, EVALUATION)
    assert accuracy == pytest.approx(1 / 3)


def test_noise_is_near_chance() -> None:
    training, evaluation = np.tile(["a", "b"], 60), np.tile(["a", "b"], 200)
    accuracy = site_balanced_accuracy(
        embeddings_of(training, told=False), training, embeddings_of(evaluation, False, seed=1), evaluation
    )
    assert accuracy == pytest.approx(0.5, abs=0.08)


def test_evaluation_subjects_do_not_touch_the_classifier() -> None:
    training = embeddings_of(TRAINING, told=True)
    evaluation = embeddings_of(EVALUATION, told=True, seed=1)
    wild = np.concatenate([evaluation, np.full((1, 6), 1e6)])
    known = site_balanced_accuracy(training, TRAINING, evaluation, EVALUATION)
    # One more evaluation subject of a site that training does not know changes nothing.
    assert site_balanced_accuracy(training, TRAINING, wild, np.append(EVALUATION, "delta")) == known


def test_unknown_sites_are_left_out() -> None:
    training = np.append(TRAINING, ["", "n/a"])
    wild = np.concatenate([embeddings_of(TRAINING, told=True), np.full((2, 6), 50.0)])
    evaluation = embeddings_of(EVALUATION, told=True, seed=1)
    assert site_balanced_accuracy(wild, training, evaluation, EVALUATION) == site_balanced_accuracy(
        wild[:-2], TRAINING, evaluation, EVALUATION
    )


@pytest.mark.parametrize(
    ("training", "evaluation"),
    [(["a", "a", "a"], ["a", "b"]), (["a", "b", "a"], ["b", "b"]), (["", "", ""], ["", ""])],
)
def test_with_one_site_there_is_nothing_to_tell(training: list[str], evaluation: list[str]) -> None:
    arrays = np.random.default_rng(0).normal(size=(5, 4))
    assert site_balanced_accuracy(arrays[:3], np.array(training), arrays[3:], np.array(evaluation)) is None


def test_one_training_subject_a_site_is_enough() -> None:
    sites = np.array(["a", "b"])
    arrays = np.array([[0.0, 1.0], [5.0, 1.0]])
    assert site_balanced_accuracy(arrays, sites, arrays, sites) == 1.0


def test_openbhb_score_of_the_leaderboard() -> None:
    assert openbhb_score(0.051, 3.761) == pytest.approx(1.540, abs=5e-4)  # spec.md A.5
    assert openbhb_score(None, 3.0) is None


@pytest.mark.parametrize("rare", [1, 2])
def test_a_site_of_a_single_person_does_not_end_the_probe(rare: int) -> None:
    """Few labels: folds inside the training people would have one site only."""
    generator = np.random.default_rng(0)
    sites = np.array(["a"] * 5 + ["b"] * rare)
    embeddings = generator.normal(size=(len(sites), 3)) + 9 * (sites == "b")[:, None]
    others = np.array(["a", "b", "a", "b"])
    score = site_balanced_accuracy(
        embeddings, sites, 9.0 * (others == "b")[:, None] + np.zeros((4, 3)), others
    )
    assert score == 1.0
