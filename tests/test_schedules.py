import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from numpyro.distributions import biject_to

from probdiff import schedules

T = 1000
TINY_FIRST = np.concatenate([[1e-6], np.geomspace(1e-5, 0.05, T - 1)])
ALL = {
    "given": schedules.Fixed(TINY_FIRST),
    "linear": schedules.linear(T),
    "cosine": schedules.cosine(T),
    "harmonic": schedules.harmonic(T),
    "log_snr_linear": schedules.log_snr_linear(T),
    "learned betas": schedules.LearnedBetas(T, TINY_FIRST),
    "learned betas, default": schedules.LearnedBetas(T),
    "learned SNR": schedules.LearnedSNR(T),
}


def exact_beta(name):
    """β_t in float64, without the package where it can be said in a line."""
    t = np.arange(1, T + 1)
    if name == "harmonic":
        return 1 / (T - t + 1)
    if name == "linear":
        return np.linspace(1e-4, 0.02, T)
    if name == "cosine":
        f = np.cos(np.pi / 2 * (np.arange(T + 1) / T + 0.008) / 1.008) ** 2
        return np.minimum(1 - f[1:] / f[:-1], 0.999)
    if name in ("log_snr_linear", "learned betas, default", "learned SNR"):
        log_snr = 8 - 10 * t / T if name == "learned SNR" else np.linspace(5, -2, T)
        alpha_bar = np.concatenate([[1], 1 / (1 + np.exp(-log_snr))])
        return 1 - alpha_bar[1:] / alpha_bar[:-1]
    return TINY_FIRST


@pytest.mark.parametrize("name", ALL)
def test_float32_coefficients_agree_with_float64(name):
    beta = exact_beta(name)
    with np.errstate(divide="ignore"):
        log_alpha_bar = np.concatenate([[0], np.cumsum(np.log1p(-beta))])
    alpha_bar, one_less = np.exp(log_alpha_bar), -np.expm1(log_alpha_bar)
    noise, t = ALL[name](), np.arange(1, T + 1)
    rho = one_less[:-1] / one_less[1:]
    expected = {
        "beta": (noise.beta, beta),
        "step mean": (noise.step(t)[0], np.sqrt(1 - beta)),
        "step std": (noise.step(t)[1], np.sqrt(beta)),
        "marginal mean": (noise.marginal(t)[0], np.sqrt(alpha_bar[1:])),
        "marginal std": (noise.marginal(t)[1], np.sqrt(one_less[1:])),
        "posterior of x_0": (noise.posterior(t)[0], np.sqrt(alpha_bar[:-1]) * beta / one_less[1:]),
        "posterior of x_t": (noise.posterior(t)[1], np.sqrt(1 - beta) * rho),
        "posterior std": (noise.posterior(t)[2], np.sqrt(beta * rho)),
    }
    for what, (got, want) in expected.items():
        assert np.asarray(got).dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-30, err_msg=what)


@pytest.mark.parametrize("make", [schedules.linear, schedules.cosine, schedules.harmonic, schedules.log_snr_linear])
@pytest.mark.parametrize("num_timesteps", [1, 2, 7])
def test_short_schedules_are_valid(make, num_timesteps):
    noise = make(num_timesteps)()
    assert noise.beta.shape == noise.log_snr.shape == (num_timesteps,)
    assert np.all((np.asarray(noise.beta) > 0) & (np.asarray(noise.beta) <= 1))
    assert np.all(np.diff(noise.alpha_bar) < 0)


def test_harmonic_ends_in_pure_noise():
    noise = schedules.harmonic(10)()
    np.testing.assert_allclose(noise.beta, 1 / np.arange(10, 0, -1), rtol=1e-6)
    assert noise.alpha_bar[-1] == 0
    assert noise.marginal(10)[1] == 1


def test_learned_snr_keeps_its_params_at_any_length():
    params = {
        "log_snr_start": np.float32(6.0),
        "log_snr_span": np.float32(9.0),
        "log_snr_shares": np.arange(1, 17, dtype=np.float32) / 136,
    }
    curve = {}
    for num_timesteps in (10, 40):
        noise = handlers.substitute(schedules.LearnedSNR(num_timesteps), data=params)()
        assert np.all(np.diff(noise.log_snr) < 0)
        np.testing.assert_allclose(noise.log_snr[-1], 6 - 9, rtol=1e-5)
        # β_t and ᾱ_t come by different roads in the code
        np.testing.assert_allclose(np.cumprod(1 - np.asarray(noise.beta, np.float64)), noise.alpha_bar[1:], rtol=1e-5)
        curve[num_timesteps] = np.asarray(noise.log_snr)
    np.testing.assert_allclose(curve[40][3::4], curve[10], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: schedules.cosine(0), ValueError, "num_timesteps is 0"),
        (lambda: schedules.LearnedBetas(-3), ValueError, "num_timesteps is -3"),
        (lambda: schedules.LearnedSNR(2.5), ValueError, "num_timesteps is 2.5"),
        (lambda: schedules.Fixed([0.1, 1.0]), ValueError, r"beta\[1\] is 1"),
        (lambda: schedules.Fixed([0.0, 0.5]), ValueError, r"beta\[0\] is 0"),
        (lambda: schedules.Fixed([0.1, np.nan]), ValueError, r"beta\[1\] is nan"),
        (lambda: schedules.Fixed([[0.1]]), ValueError, "shape"),
        (lambda: schedules.LearnedBetas(3, [0.1, 0.2]), ValueError, "initial has 2 values"),
        (lambda: schedules.LearnedBetas(2, [0.1, 1.2]), ValueError, r"beta\[1\] is 1.2"),
        (lambda: schedules.linear(10, last=1.5), ValueError, "strictly between 0 and 1"),
        (lambda: schedules.log_snr_linear(10, -2, 3), ValueError, "must fall"),
    ],
)
def test_bad_schedules_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_learned_betas_are_a_constrained_param():
    schedule = schedules.LearnedBetas(4, schedules.harmonic(4))
    site = handlers.trace(schedule).get_trace()["beta"]
    assert site["type"] == "param"
    np.testing.assert_allclose(site["value"], [1 / 4, 1 / 3, 1 / 2, 1 / 2], rtol=1e-6)
    assert bool(site["kwargs"]["constraint"].check(site["value"]).all())
    np.testing.assert_allclose(schedules.LearnedBetas(2, [0.1, 0.9])().beta, [0.1, 0.9], rtol=1e-6)


def test_gradient_at_a_step_of_no_posterior_noise_is_finite():
    gradient = jax.grad(lambda beta: sum(schedules.from_beta(beta).posterior(np.arange(1, 4))[2]))(np.full(3, 0.1))
    assert np.all(np.isfinite(gradient))


def test_a_learned_chain_keeps_the_digits_of_float32_and_its_gradient_however_far_its_params_go():
    def sums(params, schedule):
        noise = handlers.substitute(schedule, data=params)()
        t = np.arange(1, 5)
        return sum(jnp.sum(part) for part in (*noise.step(t), *noise.marginal(t), *noise.posterior(t), noise.log_snr))

    for start, span in [(40.0, 3.0), (8.0, 90.0)]:
        schedule = schedules.LearnedSNR(4)
        params = {"log_snr_start": start, "log_snr_span": span, "log_snr_shares": np.full(16, 1 / 16)}
        noise = handlers.substitute(schedule, data=params)()
        assert noise.beta[0] >= 0.9e-10
        assert np.all(np.isfinite(noise.log_alpha))
        total, gradient = jax.value_and_grad(sums)(jax.tree.map(jnp.float32, params), schedule)
        assert np.isfinite(total)
        assert all(np.all(np.isfinite(leaf)) for leaf in gradient.values())

    schedule = schedules.LearnedBetas(4, [1e-30, 0.1, 0.2, 0.3])
    site = handlers.trace(schedule).get_trace()["beta"]
    far = biject_to(site["kwargs"]["constraint"])(jnp.asarray([-80.0, -80.0, 80.0, 0.0]))
    assert np.all((far >= 0.99e-10) & (far < 1))
    assert np.all(np.isfinite(jax.grad(sums)({"beta": far}, schedule)["beta"]))
