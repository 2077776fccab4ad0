import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.diffusions import exact_elbo, linear_diffusion, random_linear, random_params

from probdiff import schedules
from probdiff.fitting import times
from probdiff.likelihood import elbo as likelihood
from probdiff.likelihood import result


@pytest.mark.parametrize("covariance", ["fixed", "diagonal", "full"])
def test_elbo_parts_sum_to_the_closed_form(x64, covariance):
    d, x = linear_diffusion(covariance), np.random.default_rng(0).normal(size=(5, 2))
    parts, draws = likelihood.elbo_draws(d, random_linear(d), x, rng_key=jax.random.key(0), num_draws=2000)
    bound = likelihood.elbo(d, random_linear(d), x, rng_key=jax.random.key(0), num_draws=2000)
    assert bound.kind == "lower bound"
    np.testing.assert_allclose(bound.values, parts.elbo, rtol=1e-10)
    mcse = draws.std(0) / np.sqrt(2000)
    np.testing.assert_allclose(bound.values_mcse, mcse, rtol=1e-3)
    assert parts.prior.shape == parts.reconstruction.shape == (5,)
    assert parts.steps.shape == (5, d.num_timesteps - 1)
    expected = np.array([exact_elbo(d, x_0) for x_0 in x])
    z = (parts.elbo - expected) / mcse
    # five data: a |z| above 4.5 comes by chance in 3 of 100,000 seeds
    assert np.all(np.abs(z) < 4.5)
    assert np.all(parts.steps >= 0)
    assert np.all(parts.prior >= 0)


def test_rows_are_padded_and_not_recompiled():
    d, params = linear_diffusion("full"), random_linear(linear_diffusion("full"))
    x = np.random.default_rng(0).normal(size=(5000, 2)).astype(np.float32)
    likelihood._parts.clear_cache()
    for n in (3000, 5000, 4097):
        bound = likelihood.elbo(d, params, x[:n], rng_key=jax.random.key(0), num_draws=2)
        assert bound.values.shape == (n,)
    assert likelihood._parts._cache_size() == 1


def test_one_step_chain_has_no_middle_terms():
    d = linear_diffusion("diagonal", schedule=schedules.Fixed([0.9]))
    parts, _ = likelihood.elbo_draws(d, random_params(d), jnp.ones((3, 2)), rng_key=jax.random.key(0), num_draws=4)
    assert parts.steps.shape == (3, 0)
    assert np.all(np.isfinite(parts.elbo))


def test_the_rows_of_a_block_fall_with_the_number_of_steps(monkeypatch):
    d, sizes = linear_diffusion("fixed", schedule=schedules.linear(5000)), []
    parts = likelihood._parts
    monkeypatch.setattr(
        likelihood, "_parts", lambda d, params, x, key: sizes.append(len(x)) or parts(d, params, x, key)
    )
    likelihood.elbo(d, random_linear(d), np.ones((1000, 2)), rng_key=jax.random.key(0), num_draws=2)
    assert max(sizes) * d.num_timesteps <= 2**22


def test_az_compare_reads_the_values_and_the_errors_of_their_differences():
    rng = np.random.default_rng(0)
    datum = rng.normal(size=500)
    bounds = {
        name: result.LogLikelihood(datum + shift + 0.1 * rng.normal(size=500), np.zeros(500), "lower bound")
        for name, shift in (("worse", -0.3), ("better", 0.0))
    }
    table = az.compare({name: bound.elpd for name, bound in bounds.items()}, round_to="none")
    assert table.index.tolist() == ["better", "worse"]
    difference = bounds["worse"].values - bounds["better"].values
    assert table.loc["worse", "elpd_diff"] == pytest.approx(difference.sum())
    assert table.loc["worse", "dse"] == pytest.approx(difference.std() * np.sqrt(500))
    assert table.loc["better", "elpd"] == pytest.approx(500 * bounds["better"].mean)
    assert table.loc["better", "se"] == pytest.approx(500 * bounds["better"].standard_error)
    with pytest.raises(ValueError, match=r"values has shape \(2, 500\); az.compare wants one chain"):
        result.LogLikelihood(np.zeros((2, 500)), np.zeros((2, 500)), "lower bound").elpd  # noqa: B018


def test_time_probs_follow_the_root_mean_square_of_the_terms():
    d, x = linear_diffusion("full"), np.random.default_rng(0).normal(size=(400, 2))
    params = random_linear(d)
    found = times.time_probs(d, params, jnp.asarray(x), len(x), jax.random.key(0))
    key_rows, key_x = jax.random.split(jax.random.key(1))
    rows = jax.random.randint(key_rows, (20_000,), 0, len(x))
    _, terms = likelihood._parts(d, params, jnp.asarray(x)[rows], key_x)
    root = np.sqrt(np.mean(np.square(terms), axis=1))
    # 8,192 / 5 draws for each t: within a tenth
    np.testing.assert_allclose(found, 0.9 * root / root.sum() + 0.1 / 5, rtol=0.1)


def test_time_probs_of_a_long_chain_are_those_of_ranges_of_times():
    d = linear_diffusion("diagonal", schedule=schedules.cosine(1000))
    x, params = jnp.asarray(np.random.default_rng(0).normal(size=(400, 2))), random_linear(d)
    found = np.asarray(times.time_probs(d, params, x, len(x), jax.random.key(0)))
    starts = np.flatnonzero(np.diff(found, prepend=-1))
    widths = np.diff(np.append(starts, 1000))
    assert 30 < len(starts) <= 64
    assert found.sum() == pytest.approx(1, rel=1e-5)
    terms = np.concatenate([likelihood._parts(d, params, x, jax.random.key(i))[1] for i in (1, 2)], axis=1)
    square, fourth = (np.add.reduceat((terms**k).mean(1), starts) / widths for k in (2, 4))
    root, draws = np.sqrt(square), 8192 // len(starts)
    expected = 0.9 * root / (root @ widths) + 0.1 / 1000
    # of a root of a mean of squares, and as much again for the sum that it is divided by: 1e-4 of 64 ranges
    error = 0.5 * np.sqrt((fourth / square**2 - 1) / draws) * expected
    np.testing.assert_array_less(np.abs(found[starts] - expected), 4.8 * 2 * error)


@pytest.mark.parametrize("size", [0.0, 1e30])
def test_time_probs_of_terms_without_a_mean_square_are_even(size, monkeypatch):
    monkeypatch.setattr(times, "elbo_term", lambda d, noise, kernel, x_0, key, t: size * jnp.ones(len(x_0)))
    d, x = linear_diffusion("diagonal"), jnp.zeros((4, 2))
    found = times.time_probs(d, random_linear(d), x, 4, jax.random.key(0))
    np.testing.assert_allclose(found, 1 / d.num_timesteps, rtol=1e-5)


def test_bits_per_dim_of_even_bytes_are_eight():
    """As integers from 0 to 255, and scaled to [0, 1), whose bins are narrower."""
    as_integers = result.LogLikelihood(np.full(5, -3 * np.log(256)), np.zeros(5), "lower bound")
    scaled = result.LogLikelihood(np.zeros((2, 5)), np.zeros((2, 5)), "lower bound")
    assert as_integers.bits_per_dim(3) == pytest.approx(8)
    np.testing.assert_allclose(scaled.bits_per_dim(3, bin_width=1 / 256), [8, 8])
    for arguments, words in (((0,), "num_features is 0"), ((3, 0.0), "bin_width is 0.0")):
        with pytest.raises(ValueError, match=words):
            scaled.bits_per_dim(*arguments)
