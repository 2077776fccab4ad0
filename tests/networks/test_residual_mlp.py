"""The network itself: its start, its dropout, its dtypes, and the recipe's errors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probdiff import networks
from probdiff.networks.residual_mlp import embed_log_snr


def jittered(recipe, num_inputs=2, num_outputs=4):
    """A module whose last layer is not zero."""
    module = recipe.build(jax.random.key(0), (num_inputs,), num_outputs)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.3, leaf.shape) if eqx.is_array(leaf) else leaf, module)


@eqx.filter_jit
def outputs(module, x_t, log_snr, key=None):
    return module(x_t, log_snr, key=key)


def test_outputs_are_zero_at_the_start():
    module = networks.ResidualMLP(8, 2).build(jax.random.key(0), (3, 2), 5)
    np.testing.assert_array_equal(outputs(module, jnp.ones((3, 2)), jnp.array(1.0)), np.zeros(5))


def test_units_are_left_out_only_where_there_is_a_key():
    module, x_t, log_snr = jittered(networks.ResidualMLP(16, 1, dropout=0.5)), jnp.ones(2), jnp.array(0.3)
    whole = np.asarray(outputs(module, x_t, log_snr))
    np.testing.assert_array_equal(whole, outputs(module, x_t, log_snr))
    first, again, other = (np.asarray(outputs(module, x_t, log_snr, jax.random.key(k))) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, whole)


def test_the_log_snr_is_told_by_sines_cosines_and_tanh():
    """Written out in NumPy, at wavelengths from 4 to 64 nats; beyond 20 nats the angles stay where they are."""
    wavelength = np.geomspace(4.0, 64.0, 4)
    for log_snr in (-25.0, -1.3, 0.0, 7.0, 25.0):
        angle = 2 * np.pi * np.clip(log_snr, -20, 20) / wavelength
        wanted = [*np.sin(angle), *np.cos(angle), np.tanh(log_snr / 8)]
        np.testing.assert_allclose(embed_log_snr(jnp.array(log_snr), 8), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width is 0"),
        ({"depth": 1.5}, "depth is 1.5"),
        ({"depth": True}, "depth is True"),
        ({"num_features": 15}, "num_features is 15"),
        ({"num_features": 0}, "num_features is 0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
    ],
)
def test_bad_recipes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        networks.ResidualMLP(**options)


def test_units_of_half_precision_leave_params_and_outputs_alone():
    whole = jittered(networks.ResidualMLP(32, 2))
    half = jax.tree.unflatten(
        jax.tree.structure(networks.ResidualMLP(32, 2, dtype="bfloat16").build(jax.random.key(0), (2,), 4)),
        jax.tree.leaves(whole),
    )
    x, log_snr = jnp.array([0.3, -1.2]), jnp.array(1.0)
    exact, rounded = outputs(whole, x, log_snr), outputs(half, x, log_snr)
    assert rounded.dtype == x.dtype
    assert not np.array_equal(rounded, exact)
    np.testing.assert_allclose(rounded, exact, rtol=0.05, atol=0.05 * np.abs(exact).max())
    gradient = eqx.filter_jit(eqx.filter_grad(lambda network: network(x, log_snr).sum()))(half)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient) if eqx.is_array(leaf)} == {x.dtype}
    with jax.enable_x64(False), pytest.raises(ValueError, match='dtype is "float64"; turn it on'):
        networks.ResidualMLP(dtype="float64").build(jax.random.key(0), (2,), 4)
