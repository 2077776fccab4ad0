import io
import sys

import jax
import numpy as np
import numpyro
import optax
import pytest
from helpers.diffusions import light_diffusion, mlp_diffusion
from numpyro import handlers
from numpyro.infer import TraceMeanField_ELBO

import probdiff
from probdiff.fitting import loop as training
from probdiff.likelihood import elbo as likelihood
from probdiff.sampling import one_fit

SETTINGS = training.Settings(num_steps=60, batch_size=16, num_chains=2, check_every=10, times="even")
X = np.random.default_rng(0).normal(size=(64, 1)) * [1.0, -1.0] + 0.1 * np.random.default_rng(1).normal(size=(64, 2))
X = X.astype(np.float32)
KEY = jax.random.key(0)


def train(settings=SETTINGS, d=None, **options):
    return training.train(d or mlp_diffusion(), X, settings, rng_key=KEY, progress_bar=False, **options)


def same(a, b):
    leaves = zip(jax.tree.leaves((a.params, a.losses)), jax.tree.leaves((b.params, b.losses)), strict=True)
    return all(np.array_equal(u, v) for u, v in leaves)


@pytest.fixture(scope="module")
def whole():
    return train()


def test_fits_are_independent_and_learn(whole):
    assert whole.losses.shape == (2, 60)
    assert whole.params["beta"].shape == (2, 5)
    assert not np.array_equal(whole.params["beta"][0], whole.params["beta"][1])
    longer = train(training.Settings(num_steps=400, batch_size=16, num_chains=1, check_every=400))
    assert longer.losses[0, -50:].mean() < longer.losses[0, :50].mean() - 0.1


def test_a_second_fit_with_the_same_settings_compiles_no_steps(whole, caplog):
    with jax.log_compiles():
        equal = mlp_diffusion.__wrapped__()  # and not the same object
        other = training.train(equal, X[::-1], SETTINGS, rng_key=jax.random.key(1), progress_bar=False)
        assert not any("run_steps" in record.message for record in caplog.records)
        train(training.Settings(num_steps=7, batch_size=16, check_every=7, times="even"), light_diffusion())
        assert any("Compiling jit(run_steps)" in record.message for record in caplog.records)
    assert not np.array_equal(other.losses, whole.losses)


def test_first_loss_is_that_of_svi(whole):
    """The loop is `SVI.update` and no more: one chain, done by hand. Adam's first step is the learning rate itself."""
    d = mlp_diffusion()
    svi = training.make_svi(d, SETTINGS)
    init_key, batch_key, _ = jax.random.split(KEY, 3)
    state, update = svi.init(jax.random.split(init_key, 2)[0], X[:16]), jax.jit(svi.update)
    key, before = jax.random.split(batch_key, 2)[0], svi.optim.get_params(state.optim_state)
    for i in range(3):
        if i == 1:
            after = svi.optim.get_params(state.optim_state)
        rows = jax.random.randint(jax.random.fold_in(key, i), (16,), 0, 64)
        state, loss = update(state, X[rows])
        assert float(loss) == pytest.approx(float(whole.losses[0, i]), rel=1e-5)
    change = jax.tree.map(lambda a, b: float(abs(a - b).max()), before, after)
    assert change["beta"] == pytest.approx(10 * SETTINGS.learning_rate, rel=1e-2)
    assert change["network$params"].last.bias == pytest.approx(SETTINGS.learning_rate, rel=1e-2)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.02), pytest.param(numpyro.optim.Adam(0.02), marks=pytest.mark.slow)])
def test_an_optimiser_of_ones_own_takes_the_place_of_adam(optimizer):
    """The first step by hand: minus 0.02 times the gradient, or 0.02 in the direction of minus its sign."""
    d = mlp_diffusion("fixed")
    settings = training.Settings(num_steps=2, batch_size=16, check_every=2, times="even", optimizer=optimizer)
    svi = training.make_svi(d, settings)
    state = svi.init(KEY, X[:16])
    (after, _), before = jax.jit(svi.update)(state, X[:16]), svi.optim.get_params(state.optim_state)
    _, key = jax.random.split(state.rng_key)

    def loss(params):
        model, guide = (handlers.scale(one, scale=1 / 16) for one in (d.reverse_at_time, d.forward_at_time))
        return TraceMeanField_ELBO().loss(key, svi.constrain_fn(params), model, guide, X[:16])

    change = jax.tree.map(lambda a, b: a - b, svi.optim.get_params(after.optim_state), before)
    gradient = jax.jit(jax.grad(loss))(before)
    slope = gradient["beta"]
    direction = slope if isinstance(optimizer, optax.GradientTransformation) else np.sign(slope)
    np.testing.assert_allclose(change["beta"], -0.02 * direction, rtol=1e-3, atol=1e-7)


def test_a_fit_by_an_optimiser_of_ones_own_learns_and_shows_its_loss(monkeypatch):
    x = 100 * np.sign(X) + 10.0 * X  # in two places, where a Gaussian is poor
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    options = {
        "rng_key": KEY,
        "num_steps": 300,
        "batch_size": 16,
        "check_every": 300,
        "times": "even",
        "validation": 0.0,
        "dropout": False,
    }
    fit = probdiff.fit(light_diffusion(), x, optimizer=optax.adamw(2e-2), **options)
    assert f"loss {fit.losses.mean():.4f} nats per datum" in sys.stderr.getvalue()
    assert fit.losses[-50:].mean() < fit.losses[:50].mean() - 0.1
    for name in ("learning_rate", "gradient_clip"):
        with pytest.raises(ValueError, match=f"{name} is 0.1, and optimizer is given"):
            probdiff.fit(light_diffusion(), x, optimizer=optax.sgd(0.1), **{name: 0.1}, **options)
    with pytest.raises(TypeError, match=r"optimizer is 0\.1; it must be an Optax transformation"):
        probdiff.fit(light_diffusion(), x, optimizer=0.1, **options)


def test_the_params_that_are_checked_are_an_average():
    """Of three steps, done by hand; so early the average is the plain mean."""
    settings = training.Settings(num_steps=3, batch_size=16, num_chains=1, check_every=3, times="even")
    trained = train(settings, light_diffusion(), validation=X)
    svi = training.make_svi(light_diffusion(), settings)
    init_key, batch_key, _ = jax.random.split(KEY, 3)
    state, key = svi.init(jax.random.split(init_key, 1)[0], X[:16]), jax.random.split(batch_key, 1)[0]
    steps, update, get_params = [], jax.jit(svi.update), jax.jit(svi.get_params)
    for i in range(3):
        rows = jax.random.randint(jax.random.fold_in(key, i), (16,), 0, 64)
        state, _ = update(state, X[rows])
        steps.append(get_params(state))
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *steps)
    for a, b in zip(jax.tree.leaves(one_fit(trained.params, 0)), jax.tree.leaves(mean), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["mean_field", "trace"])
def test_other_objectives_fit_too(objective):
    settings = training.Settings(num_steps=300, batch_size=16, objective=objective, check_every=150)
    trained = train(settings, mlp_diffusion("fixed"))
    assert np.all(np.isfinite(trained.losses))
    assert trained.losses[0, -50:].mean() < trained.losses[0, :50].mean() - 0.1


def test_early_stopping_keeps_the_best_of_each_fit():
    settings = training.Settings(
        num_steps=2000, batch_size=8, num_chains=2, learning_rate=0.02, check_every=20, patience=3, times="even"
    )
    d = light_diffusion(width=32)
    trained = training.train(d, X[:8], settings, rng_key=KEY, validation=X[8:], progress_bar=False)
    steps, checks = trained.losses.shape[1], trained.validation.shape[1]
    assert steps < 2000
    assert checks == steps // 20
    assert np.all(checks - 1 - trained.validation.argmax(1) >= 3)
    *_, validation_key = jax.random.split(KEY, 3)
    for c in range(2):
        params = one_fit(trained.params, c)
        bound = likelihood.elbo(d, params, X[8:], rng_key=validation_key, num_draws=2)
        assert bound.mean == pytest.approx(trained.validation[c].max(), rel=1e-5)


def test_a_loss_that_is_not_finite_is_an_error():
    with pytest.raises(FloatingPointError, match="loss of chain 0 is nan at step 0"):
        training.train(mlp_diffusion(), np.full_like(X, np.nan), SETTINGS, rng_key=KEY, progress_bar=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"num_chains": 1.5}, "num_chains is 1.5"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"objective": "elbo"}, "objective is 'elbo'; it must be one of at_time, mean_field, trace"),
        ({"patience": 0}, "patience is 0"),
        ({"times": "odd"}, "times is 'odd'; it must be one of even, weighted"),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        training.Settings(**options)


def test_progress_is_quiet_when_not_a_terminal(capfd):
    training.train(mlp_diffusion(), X, SETTINGS, rng_key=KEY)
    out, err = capfd.readouterr()
    assert out == err == ""
