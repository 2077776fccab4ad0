import resource
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
import scipy.stats
from helpers.diffusions import fit_of, light_diffusion, mlp_diffusion, random_params
from helpers.once import once
from helpers.pairs import slow_unless
from numpyro.infer.util import log_density

import probdiff
from probdiff import Fit, GaussianDiffusion, datasets, networks, posterior, schedules

KEY = jax.random.key(0)
LOC, SCALE = np.array([100.0, -3.0]), np.array([20.0, 0.01])


@pytest.fixture(scope="module")
def x():
    return np.asarray(datasets.eight_gaussians().sample(KEY, 2000), np.float64)


def small(d=None, **options):
    """A function that fits, without rows held out unless it is told."""
    options = {
        "num_steps": 300,
        "batch_size": 64,
        "check_every": 300,
        "validation": 0.0,
        "progress_bar": False,
    } | options
    return lambda x: probdiff.fit(d or mlp_diffusion(), x, rng_key=KEY, **options)


@pytest.fixture(scope="module")
def fitted(x):
    return small(num_chains=2)(x)


NAMES = ["age", "mmol"]
METHODS = ["elbo", "iwae", "smc", "ode", "upper", "exact"]


@pytest.fixture(scope="module")
def single(x):
    return small()(pd.DataFrame(x, columns=NAMES))


def test_shapes_of_one_chain_and_of_several(fitted, single, x):
    assert single.beta.shape == single.log_snr.shape == single.params["beta"].shape == (5,)
    assert single.losses.shape == (300,)
    assert single.sample(KEY, 7).shape == (7, 2)
    assert fitted.beta.shape == fitted.params["beta"].shape == (2, 5)
    assert fitted.losses.shape == (2, 300)
    assert fitted.sample(KEY, 7).shape == (2, 7, 2)
    parts = fitted.elbo_parts(x[:9], rng_key=KEY)
    assert parts.prior.shape == parts.reconstruction.shape == (2, 9)
    assert parts.steps.shape == (2, 9, 4)
    result = fitted.log_likelihood(x[:9], rng_key=KEY)
    assert result.values.shape == (2, 9)
    assert result.mean.shape == result.mcse.shape == result.standard_error.shape == (2,)
    assert result.kind == "lower bound"
    np.testing.assert_allclose(result.values, parts.elbo)
    one = fitted.chain(1)
    np.testing.assert_array_equal(one.beta, fitted.beta[1])
    assert single.log_likelihood(x[:9], rng_key=KEY).values.shape == (9,)


def test_a_second_evaluation_with_new_data_compiles_nothing(single, x, caplog):
    def evaluate(seed, n):
        key = jax.random.key(seed)
        rows = x[seed : seed + n]
        single.log_likelihood(rows, rng_key=key)
        single.elbo_parts(rows, rng_key=key)
        single.sample(key, n)

    def compilations():
        return sum("Compiling" in record.message for record in caplog.records)

    with jax.log_compiles():
        evaluate(0, 120)
        assert compilations() > 0
        caplog.clear()
        evaluate(1, 120)
        evaluate(2, 100)  # padded to the same size
        assert compilations() == 0


def test_a_fit_starts_from_another(single, x):
    """In its units, from its params: steps of no length leave it as it is."""
    d, options = light_diffusion(), {"optimizer": optax.sgd(0.0), "num_steps": 10, "check_every": 10}
    first = replace(fit_of(d, random_params(d), LOC, SCALE), features=tuple(NAMES))
    frame = pd.DataFrame(x * SCALE + LOC + 1.0, columns=NAMES)[NAMES[::-1]]
    same = small(d, init=first, num_chains=2, **options)(frame)
    np.testing.assert_array_equal(same.loc, LOC)
    assert same.features == tuple(NAMES)
    for leaf, wanted in zip(jax.tree.leaves(same.params), jax.tree.leaves(first.params), strict=True):
        np.testing.assert_allclose(leaf, np.stack([wanted] * 2), rtol=1e-6)
    for other in (light_diffusion(width=9), mlp_diffusion("diagonal", d.schedule)):
        with pytest.raises(ValueError, match="init is a fit of another diffusion"):
            small(other, init=first)(frame)
    with pytest.raises(TypeError, match="init is 3; it must be a fit"):
        small(init=3)(x)
    with pytest.raises(ValueError, match="init has 2 chains; num_chains is 3"):
        small(d, init=same, num_chains=3)(frame)
    with pytest.raises(ValueError, match="has no column 'mmol'"):
        small(d, init=first)(frame[["age"]])


@once
def fits_of_both_precisions():
    fits = []
    for made in (False, True):
        with jax.enable_x64(made):
            d = GaussianDiffusion((2,), schedules.linear(2), networks.ResidualMLP(4, 1), "full")
            fits.append(fit_of(d, jax.jit(d.initial_params)(KEY)))
    return fits


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("method", slow_unless(METHODS, ["iwae"]))
def test_a_fit_is_used_in_another_precision(method, used):
    """One made in single precision, in double precision, and the other way round."""
    x = np.random.default_rng(0).normal(size=(4, 2))
    with jax.enable_x64(used):
        values = []
        for fit in fits_of_both_precisions():
            given = fit.sample(KEY, 4, paths=True) if method == "upper" else x
            values.append(fit.log_likelihood(given, rng_key=KEY, method=method, num_particles=50).mean)
    assert values[0] == pytest.approx(values[1], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("used", [False, True])
def test_posteriors_and_trees_are_made_in_another_precision(used):
    x = np.random.default_rng(0).normal(size=(4, 2))
    with jax.enable_x64(used):
        for fit in fits_of_both_precisions():
            seen = posterior.Missing(np.array([[0.3, np.nan]]))
            dt = posterior.sample(fit, seen, rng_key=KEY, num_particles=50, num_filters=2)
            assert np.isfinite(dt["posterior"]["x_0"]).all()
            assert np.isfinite(fit.to_datatree(x, rng_key=KEY, num_draws=25)["log_likelihood"]["x_0"]).all()


def test_what_is_traced_is_refused_and_the_programs_can_be(single, x):
    with pytest.raises(TypeError, match=r"x is traced by JAX.*log_density\(d\.reverse, \(x_0,\), \{'stacked': True\}"):
        jax.grad(lambda x: single.log_likelihood(x, rng_key=KEY).mean)(x[:3])
    path = single.sample(KEY, 1, paths=True)[0].astype(np.float32)

    def log_p(x_0):
        values = {**single.params, "x": jnp.asarray(path[:0:-1])}
        return log_density(single.diffusion.reverse, (x_0,), {"stacked": True}, values)[0]

    assert np.isfinite(jax.jit(jax.grad(log_p))(path[0])).all()


def test_even_times_are_another_fit(single, x):
    assert not np.array_equal(single.losses, small(times="even")(x).losses)


def test_everything_is_in_the_units_of_the_data(single, x):
    """The same data in other units: densities change by the log-determinant, draws by the affine map."""
    other = small()(LOC + SCALE * x)
    log_det = np.log(SCALE).sum()
    np.testing.assert_allclose(other.losses, single.losses + log_det, atol=2e-2)
    there = other.log_likelihood(LOC + SCALE * x[:50], rng_key=KEY)
    here = single.log_likelihood(x[:50], rng_key=KEY)
    np.testing.assert_allclose(there.values, here.values - log_det, atol=2e-2)
    parts = other.elbo_parts(LOC + SCALE * x[:50], rng_key=KEY)
    np.testing.assert_allclose(parts.elbo, there.values, atol=1e-9)
    np.testing.assert_allclose((other.sample(KEY, 20) - LOC) / SCALE, single.sample(KEY, 20), atol=2e-2)


def test_losses_and_held_out_bound_speak_of_the_same_number(x):
    """Both are K of nearly the same params once the learning rate is near zero, on the same data."""
    fitted = small(light_diffusion(), num_steps=2000, batch_size=500, check_every=2000, times="even")(x)
    bound = fitted.log_likelihood(x, rng_key=KEY, num_draws=20)
    tail = fitted.losses[-200:]
    assert abs(tail.mean() + bound.mean) < 4 * np.hypot(tail.std() / np.sqrt(200), bound.mcse) + 0.01


def test_the_mean_bound_is_no_greater_than_the_exact_value(single):
    mixture = datasets.eight_gaussians()
    test = np.asarray(mixture.sample(jax.random.key(1), 4000))
    bound = single.log_likelihood(test, rng_key=KEY)
    assert bound.mean < np.asarray(mixture.log_prob(test)).mean() + 4 * bound.mcse


@pytest.fixture
def handed_over(monkeypatch):
    """What `fit` hands to `training.train`, for given data and options."""

    class HandedOver(Exception):
        pass

    def stop(d, x, settings, **options):
        raise HandedOver(x, settings, options.get("validation"), options.get("smoothing"))

    monkeypatch.setattr("probdiff.fitting.fit.train", stop)
    monkeypatch.setattr(
        "probdiff.fitting.fit.cross_validate", lambda d, x, settings, tried, **_: stop(d, x, settings, smoothing=tried)
    )

    def hand_over(data, **options):
        with pytest.raises(HandedOver) as caught:
            small(**{"num_steps": 20, "batch_size": None, "check_every": None, "validation": None} | options)(data)
        return caught.value.args

    return hand_over


def test_few_data_are_guarded_against_overfitting_and_many_are_not(handed_over, x):
    few, more_rows, many = x[:199], x[:200], np.tile(x, (5, 1))  # of two features
    rows, settings, _, smoothings = handed_over(few)  # to cross-validation
    standardised = (few - few.mean(0)) / few.std(0)
    np.testing.assert_allclose(rows, standardised, rtol=1e-5, atol=1e-6)
    assert (settings.dropout, settings.patience, settings.check_every, settings.batch_size) == (True, 10, 100, 199)
    assert (settings.learning_rate, smoothings) == (1e-3, (0.0, 0.5))
    assert handed_over(few, smoothing=0.2)[3] == (0.2,)
    for data, more in ((many, {}), (few, {"validation": 0, "dropout": False})):
        rows, settings, held_out, smoothing = handed_over(data, **more)
        assert (len(rows), held_out, smoothing) == (len(data), None, None)
        assert (settings.dropout, settings.patience, settings.check_every) == (False, None, 500)
    rows, settings, held_out, _ = handed_over(more_rows)
    assert (len(rows), len(held_out), settings.patience, settings.check_every) == (170, 30, 20, 100)
    assert (settings.dropout, settings.learning_rate) == (False, 2e-3)
    rows, settings, held_out, _ = handed_over(more_rows, validation=0.25, dropout=True, patience=3)
    assert (len(rows), len(held_out), settings.dropout, settings.patience) == (150, 50, True, 3)
    assert settings.learning_rate == 2e-3
    assert handed_over(x[:5])[2] is None  # too few to hold any out
    rows, settings, held_out, _ = handed_over(few, validation=0.3)
    assert (settings.patience, len(rows) + len(held_out)) == (20, 199)


def test_a_fit_is_five_lines_and_a_log_likelihood_one(fitted, single, x):
    lines = repr(single).splitlines()
    assert len(lines) == 5
    assert lines[0] == "Fit of a GaussianDiffusion: 2 feature(s) (age, mmol), T = 5, covariance full"
    assert lines[1:3] == ["1 chain(s) of 300 steps", lines[2]]
    assert lines[2].startswith("loss of the last tenth of its steps, nats per datum: ")
    assert single.steps_kept == [300]
    watched = small(num_steps=400, check_every=100, validation=0.2)(x)
    best = (1 + int(watched.validation.argmax())) * 100
    assert watched.steps_kept == [best]
    assert f", after {best} steps" in repr(watched)
    bound = fitted.log_likelihood(x[:40], rng_key=KEY)
    said = ", ".join(f"{mean:.4f} ± {error:.4f}" for mean, error in zip(bound.mean, bound.standard_error, strict=True))
    assert repr(bound) == f"LogLikelihood: lower bound, mean of 40 data {said} nats"


def test_the_best_chain_is_that_of_the_best_validation_elbo(fitted):
    losses, validation = np.array([[3.0, 1.0], [3.0, 2.0]]), np.array([[-2.0, -5.0], [-1.0, np.nan]])
    without = replace(fitted, stacked_losses=losses, stacked_validation=np.empty((2, 0)))
    assert without.best == 0
    assert replace(without, stacked_validation=validation).best == 1


@pytest.mark.slow
def test_the_defaults_for_few_data_are_better_than_none():
    """60 rows of a normal distribution in eight dimensions, whose exact log-likelihood is known."""
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(60, 8)), rng.normal(size=(500, 8))
    d = mlp_diffusion(event_shape=(8,), width=64)
    guarded, unguarded = (
        small(d, num_steps=1500, batch_size=None, check_every=None, **options)(train)
        for options in ({"validation": None}, {"validation": 0, "dropout": False})
    )
    assert guarded.validation.size > 0
    assert unguarded.validation.shape == (0,)
    held_out = [fitted.log_likelihood(test, rng_key=KEY) for fitted in (guarded, unguarded)]
    exact = scipy.stats.norm.logpdf(test).sum(1).mean()
    assert held_out[0].mean > held_out[1].mean + 1
    assert exact - 1.5 < held_out[0].mean < exact


def test_equal_keys_give_equal_fits_and_old_style_keys_do(x, single):
    """And so does naming the times that are the default."""
    again = probdiff.fit(
        mlp_diffusion(),
        x,
        rng_key=jax.random.PRNGKey(0),
        num_steps=300,
        batch_size=64,
        check_every=300,
        times="weighted",
        validation=0.0,
        progress_bar=False,
    )
    np.testing.assert_array_equal(again.losses, single.losses)


@pytest.mark.parametrize(
    ("schedule", "covariance"),
    [
        pytest.param(schedules.LearnedSNR(6), "fixed", marks=pytest.mark.slow),
        pytest.param(schedules.harmonic(6), "diagonal", marks=pytest.mark.slow),
        (schedules.cosine(1), "full"),
    ],
)
def test_every_schedule_and_covariance_can_be_fitted(x, schedule, covariance):
    d = mlp_diffusion(covariance, schedule)
    fitted = small(d, num_steps=50, check_every=50)(x)
    assert np.all(np.isfinite(fitted.losses))
    assert fitted.beta.shape == (schedule.num_timesteps,)
    assert np.all(np.isfinite(fitted.sample(KEY, 5)))


def test_columns_of_a_frame_are_taken_by_name(single, x, tmp_path):
    """The same rows with columns in another order, of other dtypes and from another library are the same data."""
    frame = pd.DataFrame(x[:40], columns=NAMES)
    single.save(tmp_path / "fit.npz")
    read = Fit.load(tmp_path / "fit.npz", single.diffusion)
    assert single.features == read.features == single.chain(0).features == tuple(NAMES)
    wanted = single.log_likelihood(x[:40], rng_key=KEY).values
    nullable, arrow = frame.convert_dtypes(), frame.astype("float64[pyarrow]")
    sparse = frame.astype(pd.SparseDtype("float64", 0.0))
    single_precision = frame.astype("float32").astype(float)
    for other in (frame, frame[NAMES[::-1]], nullable[NAMES[::-1]], arrow, sparse, single_precision):
        np.testing.assert_allclose(read.log_likelihood(other, rng_key=KEY).values, wanted, atol=1e-5)
    dt = single.to_datatree(frame[NAMES[::-1]], rng_key=KEY, num_draws=25)
    assert dt["posterior"]["feature"].to_numpy().tolist() == NAMES
    np.testing.assert_array_equal(dt["observed_data"]["x_0"], frame)
    np.testing.assert_array_equal(single.checked(jnp.asarray(x[:40], jnp.bfloat16)), x[:40].astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda frame: frame[["age"]], ValueError, "has no column 'mmol', which this fit was made with; its"),
        (lambda frame: frame.assign(other=1.0), ValueError, "has a column 'other', which this fit was not made with"),
        (lambda frame: frame.set_axis(["age", "age"], axis=1), ValueError, "several columns called 'age'"),
        (lambda frame: pd.concat({"a": frame}, axis=1), ValueError, "names of 2 levels.*set_axis"),
        (lambda frame: frame.assign(mmol="high"), TypeError, "column 'mmol' of x has dtype .*; it must hold numbers"),
        (lambda frame: frame.assign(mmol=np.nan), ValueError, r"NaN or infinite, in row\(s\) 0.*column\(s\) mmol"),
    ],
)  # fmt: skip
def test_columns_of_another_frame_are_refused(single, x, change, error, words):
    with pytest.raises(error, match=words):
        single.log_likelihood(change(pd.DataFrame(x[:40], columns=NAMES)), rng_key=KEY)


@pytest.mark.slow
def test_features_that_were_dequantised_come_out_as_integers(tmp_path):
    """Wherever values come out; a path, which a bound is taken of, stays as the chain has it."""
    d = light_diffusion()
    rng = np.random.default_rng(0)
    counts = rng.poisson(30, size=(200, 1)) + rng.uniform(size=(200, 1))
    frame = pd.DataFrame(np.hstack([rng.normal(size=(200, 1)), counts]), columns=NAMES)
    options = {"num_steps": 10, "check_every": 10, "validation": 0.0}
    made = small(d, **options, whole=["mmol"])(frame)
    made.save(tmp_path / "fit.npz")
    fit = Fit.load(tmp_path / "fit.npz", d)
    assert fit.whole == made.whole == made.chain(0).whole == (False, True)
    assert small(d, **options, init=fit)(frame).whole == (False, True)

    def assert_whole(draws):
        np.testing.assert_array_equal(draws[..., 1], np.floor(draws[..., 1]))
        assert np.all(draws[..., 0] != np.floor(draws[..., 0]))

    draws, paths = fit.sample(KEY, 50), fit.sample(KEY, 50, paths=True)
    assert_whole(draws)
    assert not np.array_equal(paths, np.floor(paths))
    np.testing.assert_allclose(draws[:, 1], np.floor(fit.loc + fit.scale * replace_units(fit).sample(KEY, 50))[:, 1])
    dt = fit.to_datatree(frame[:30], rng_key=KEY, num_draws=25)
    assert_whole(dt["posterior_predictive"]["x_0"].to_numpy())
    assert_whole(dt["observed_data"]["x_0"].to_numpy())
    seen = posterior.Missing(np.array([[0.3, np.nan]]))
    drawn = posterior.sample(fit, seen, rng_key=KEY, num_particles=50, num_filters=2)["posterior"]["x_0"].to_numpy()
    assert_whole(drawn)
    with pytest.raises(ValueError, match="whole has 'count'; it must hold names of features, or numbers from 0 to 1"):
        small(d, whole=["count"])(frame)


def replace_units(fit):
    """The same fit in the chain's own units."""
    return replace(fit, loc=np.zeros(2), scale=np.ones(2), whole=None)


def test_saved_fit_is_read_back_the_same(fitted, tmp_path):
    fitted.save(tmp_path / "fit.npz")
    read = Fit.load(tmp_path / "fit.npz", fitted.diffusion)
    for a, b in zip(jax.tree.leaves(fitted.params), jax.tree.leaves(read.params), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(read.sample(KEY, 5), fitted.sample(KEY, 5))
    with pytest.raises(ValueError, match="another diffusion"):
        Fit.load(tmp_path / "fit.npz", mlp_diffusion(width=9))
    with pytest.raises(ValueError, match="another diffusion"):
        Fit.load(tmp_path / "fit.npz", mlp_diffusion(schedule=schedules.cosine(5)))
    with pytest.raises(ValueError, match="another diffusion: its covariance"):
        Fit.load(tmp_path / "fit.npz", mlp_diffusion("diagonal"))
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="it holds other arrays"):
        Fit.load(tmp_path / "other.npz", fitted.diffusion)
    d = mlp_diffusion(schedule=schedules.cosine(5))
    fit_of(d, d.initial_params(KEY)).save(tmp_path / "cosine.npz")
    with pytest.raises(ValueError, match="its β_t are not those"):
        Fit.load(tmp_path / "cosine.npz", mlp_diffusion(schedule=schedules.linear(5)))
    with pytest.raises(ValueError, match="does not exist"):
        Fit.load(tmp_path / "none.npz", fitted.diffusion)
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"could not be read as a fit: it is no \.npz file"):
        Fit.load(tmp_path / "text.npz", fitted.diffusion)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "fit.npz").read_bytes()[:500])
    with pytest.raises(ValueError, match="could not be read as a fit"):
        Fit.load(tmp_path / "cut.npz", fitted.diffusion)


def test_a_full_disk_leaves_the_earlier_file_whole(fitted, tmp_path):
    """A limit on the size of files stands for a full disk: the write fails half way."""
    path = tmp_path / "fit.npz"
    fitted.save(path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            fitted.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def bad(x, row, column, value):
    x = x.copy()
    x[row, column] = value
    return x


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            lambda x: bad(x, 17, 1, np.nan),
            ValueError,
            r"x has 1 entries that are NaN or infinite, in row\(s\) 17 and column\(s\) 1",
        ),
        (lambda x: bad(x, 3, 0, np.inf), ValueError, r"row\(s\) 3 and column\(s\) 0"),
        (lambda x: np.hstack([x, x]), ValueError, r"x has shape \(2000, 4\); this diffusion wants \(N, 2\)"),
        (lambda x: x[:, 0], ValueError, r"x has shape \(2000,\)"),
        (lambda x: x.round().astype(int), TypeError, "x has dtype int64.*dequantise"),
        (
            lambda x: pd.DataFrame(x, columns=NAMES).astype({"age": int}),
            TypeError,
            "column 'age' of x has dtype int64.*d",
        ),
        (lambda x: x[:0], ValueError, r"x has 0 row\(s\)"),
        (lambda x: x[:1], ValueError, r"x has 1 row\(s\); it must have at least 2"),
        (lambda x: x * [1.0, 0.0] + 3, ValueError, r"same value in every row of feature\(s\) 1"),
        (lambda x: x * [0.0, 1.0], ValueError, r"same value in every row of feature\(s\) 0"),
        (lambda x: x * 1e200, ValueError, "too large or too small to standardise"),
        (lambda x: x[:20], ValueError, "batch_size is 64; x has 20 rows"),
    ],
)
def test_bad_data_are_refused(x, change, error, words):
    with pytest.raises(error, match=words):
        small()(change(x))


def test_bad_arguments_are_refused(x, single):
    d = mlp_diffusion()
    with pytest.raises(TypeError, match="rng_key is 0; it must be one key"):
        probdiff.fit(d, x, rng_key=0)
    with pytest.raises(TypeError, match="rng_key"):
        probdiff.fit(d, x, rng_key=jax.random.split(KEY))
    with pytest.raises(ValueError, match="patience wants validation data"):
        small(patience=3)(x)
    with pytest.raises(ValueError, match="pass checkpoint_dir="):
        small(resume=True)(x)
    with pytest.raises(TypeError, match="rng_key is 0"):
        single.to_datatree(x[:50], rng_key=0)
    with pytest.raises(ValueError, match="validation has shape"):
        small(validation=x[:, :1])(x)
    with pytest.raises(ValueError, match=r"validation is 1\.5; it must be data, or a share"):
        small(validation=1.5)(x)
    with pytest.raises(ValueError, match=r"validation is '0\.2'; it must be data, or a share"):
        small(validation="0.2")(x)
    with pytest.raises(TypeError, match=r"d is <class .*; it must be a diffusion"):
        probdiff.fit(probdiff.GaussianDiffusion, x, rng_key=KEY)
    with pytest.raises(
        ValueError, match=r"x has entries in row\(s\) 1 that lie more than 2\.6e\+15 of the chain's units"
    ):
        single.log_likelihood(np.array([[0.0, 0.0], [0.0, 1e20]]), rng_key=KEY)
    for c in (0.5, 0.0):
        with pytest.raises(ValueError, match=f"c is {c}"):
            single.chain(c)
    with pytest.raises(TypeError, match="num_step"):
        probdiff.fit(d, x, rng_key=KEY, num_step=3)
    with pytest.raises(ValueError, match="method is 'nuts'; it must be one of elbo, iwae"):
        single.log_likelihood(x, rng_key=KEY, method="nuts")
    with pytest.raises(ValueError, match="num_draws is 1"):
        single.log_likelihood(x, rng_key=KEY, num_draws=1)
    with pytest.raises(ValueError, match=r"row\(s\) 0"):
        single.log_likelihood(np.full((1, 2), np.nan), rng_key=KEY)
    with pytest.raises(ValueError, match="n is 0"):
        single.sample(KEY, 0)
    with pytest.raises(ValueError, match="c is 1"):
        single.chain(1)
