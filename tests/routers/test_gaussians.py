"""SEED's card: its divergence, its choice of the expert to tune, its way to decide together."""

import numpy as np
import pytest

from experts.errors import ConfigError
from routers.gaussians import Density, decide_together, divergence, expert_to_tune


def density(mean, covariance):
    return Density(mean_W=np.array(mean, float), covariance_WW=np.array(covariance, float))


ONE = density([0, 0], [[1, 0.3], [0.3, 0.5]])
OTHER = density([1, -1], [[2, -0.4], [-0.4, 1]])


def test_the_divergence_is_what_sampling_says():
    points = np.random.default_rng(0).multivariate_normal(ONE.mean_W, ONE.covariance_WW, 100_000)
    sampled = (ONE.log_likelihood(points) - OTHER.log_likelihood(points)).mean()
    assert divergence(ONE, OTHER) == pytest.approx(sampled, rel=0.02)


def test_the_divergence_of_a_density_to_itself_is_nothing():
    assert divergence(ONE, ONE) == pytest.approx(0, abs=1e-12)
    assert divergence(ONE, OTHER) != pytest.approx(divergence(OTHER, ONE))


def test_log_likelihoods_are_scipys():
    from scipy.stats import multivariate_normal

    points = np.random.default_rng(0).normal(size=(20, 2))
    expected = multivariate_normal(ONE.mean_W, ONE.covariance_WW).logpdf(points)
    np.testing.assert_allclose(ONE.log_likelihood(points), expected)


def test_the_expert_that_sees_the_new_classes_apart_is_tuned():
    unit = np.eye(2)
    near = [density([0, 0], unit), density([0.1, 0], unit), density([0, 0.1], unit)]
    far = [density([0, 0], unit), density([5, 0], unit), density([0, 5], unit)]
    assert expert_to_tune({"mixes them up": near, "tells them apart": far}) == "tells them apart"
    assert expert_to_tune({"first": near, "second": near}) == "first"
    with pytest.raises(ConfigError, match="Two new classes"):
        expert_to_tune({"x": near[:1]})


def test_a_class_is_averaged_over_the_experts_that_know_it():
    unit = np.eye(1)
    cats, dogs, birds = density([0], unit), density([4], unit), density([8], unit)
    known = {"old": {"cats": cats, "dogs": dogs}, "new": {"cats": cats, "birds": birds}}
    points = np.array([[0.0], [4.0], [8.0]])
    shares = decide_together(known, {"old": points, "new": points}, temperature=1.0)
    old, new = (decide_together({e: known[e]}, {e: points}, temperature=1.0) for e in ("old", "new"))
    np.testing.assert_allclose(shares["dogs"], old["dogs"])
    np.testing.assert_allclose(shares["birds"], new["birds"])
    np.testing.assert_allclose(shares["cats"], (old["cats"] + new["cats"]) / 2)
    assert max(shares, key=lambda c: shares[c][0]) == "cats"


def test_a_higher_temperature_is_less_sure():
    known = {"x": {"a": density([0], [[1]]), "b": density([3], [[1]])}}
    points = {"x": np.array([[0.0]])}
    sure, unsure = (decide_together(known, points, temperature=t)["a"][0] for t in (1.0, 3.0))
    assert sure > unsure > 0.5


def test_few_points_in_many_dimensions_still_have_a_density():
    points = np.random.default_rng(0).normal(size=(4, 30))
    assert np.isfinite(Density.fit(points).log_likelihood(points)).all()
    with pytest.raises(ConfigError, match="two points"):
        Density.fit(points[:1])
