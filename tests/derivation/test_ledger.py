"""What is true of the ledger whatever the pair: how much it compiles, and which rows have no reader."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from probdiff import GaussianDiffusion, datasets, derivation, networks, schedules

KEY = jax.random.key(0)
COMPILATION = "/jax/core/compile/backend_compile_duration"


def compilations(d, **options):
    """How many programs a ledger of d compiles, from nothing."""
    count = 0

    def on_event(event, duration, **_):
        nonlocal count
        count += event == COMPILATION

    x = np.asarray(datasets.SwissRoll(0.5).sample(KEY, 16))
    params = derivation.typical_params(d, KEY)
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(on_event)
    try:
        ledger = derivation.check(
            d.reverse, d.forward, x, rng_key=KEY, params=params, forms=derivation.forms(d), **options
        )
    finally:
        jax.monitoring.unregister_event_duration_listener(on_event)
    ledger.assert_holds()
    return count


@pytest.mark.slow
def test_the_ledger_of_the_default_pair_compiles_few_programs(x64):
    d = GaussianDiffusion((2,), schedules.LearnedBetas(40), networks.ResidualMLP(), "full")
    assert compilations(d) <= 205


LEVELS, T = 3, 2


def forward(x_0):
    """Each step keeps the level with probability 0.7, and else draws one evenly."""
    with numpyro.plate("data", len(x_0)):
        x = x_0
        for t in range(1, T + 1):
            x = numpyro.sample(f"x_{t}", dist.Categorical(0.7 * jax.nn.one_hot(x, LEVELS) + 0.1).to_event(1))


def reverse(x_0):
    with numpyro.plate("data", len(x_0)):
        x = numpyro.sample(f"x_{T}", dist.Categorical(jnp.full((len(x_0), 2, LEVELS), 1 / 3)).to_event(1))
        for t in range(T, 0, -1):
            kernel = dist.Categorical(0.6 * jax.nn.one_hot(x, LEVELS) + 0.4 / 3).to_event(1)
            x = numpyro.sample(f"x_{t - 1}", kernel, obs=x_0 if t == 1 else None)


def test_rows_do_not_apply_to_distributions_that_have_no_reader(x64):
    x = np.random.default_rng(0).integers(0, LEVELS, (12, 2))
    ledger = derivation.check(reverse, forward, x, rng_key=KEY, num_draws=2000)
    ledger.assert_holds()
    for tag in ("N1", "N3", "N4", "N6", "N7", "N8", "N10"):
        assert ledger[tag].verdict == "not applicable"
        assert ledger[tag].detail == "because the ledger has no reader of CategoricalProbs"
    for tag in ("N2", "N5", "N9", "N12", "N13", "N14", "N15", "N16", "N17"):
        assert ledger[tag].verdict == "holds", str(ledger[tag])


def test_a_slip_is_caught_without_a_reader(x64):
    def looks_back_too_far(x_0):
        with numpyro.plate("data", len(x_0)):
            numpyro.sample("x_1", dist.Categorical(0.7 * jax.nn.one_hot(x_0, LEVELS) + 0.1).to_event(1))
            numpyro.sample("x_2", dist.Categorical(0.7 * jax.nn.one_hot(x_0, LEVELS) + 0.1).to_event(1))

    x = np.random.default_rng(0).integers(0, LEVELS, (12, 2))
    ledger = derivation.check(reverse, looks_back_too_far, x, rng_key=KEY, num_draws=200)
    assert [row.statement.tag for row in ledger.failures] == ["N2"]
