"""Errors at the door: what passes, and what each error names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.distributions import constraints

from probdiff import checks

KEY = jax.random.key(0)
DIGITS = constraints.integer_interval(0, 9)


@pytest.mark.parametrize("value", [2, 7, np.int64(2), np.uint8(3)])
def test_counts_are_integers_of_at_least_the_least(value):
    checks.check_count(value, "num_draws", 2)


@pytest.mark.parametrize("value", [1, -3, True, 2.0, np.float64(3), "3", None, np.bool_(True), np.array([3])])
def test_other_counts_are_refused_by_name(value):
    with pytest.raises(ValueError, match=r"num_draws is .*; it must be an integer of at least 2"):
        checks.check_count(value, "num_draws", 2)


def test_old_style_keys_become_the_same_typed_key():
    key = jax.random.key(3)
    assert checks.check_key(key) is key
    old = checks.check_key(jax.random.PRNGKey(3))
    assert old.shape == ()
    np.testing.assert_array_equal(jax.random.normal(old, 4), jax.random.normal(key, 4))


@pytest.mark.parametrize(
    "wrong",
    [None, 0, "0", np.zeros(2), np.zeros(3, np.uint32), jax.random.split(KEY)],
    ids=["none", "seed", "word", "floats", "three", "two keys"],
)
def test_what_is_no_key_is_refused(wrong):
    with pytest.raises(TypeError, match=r"(?s)rng_key is .*; it must be one key, such as jax\.random\.key\(0\)"):
        checks.check_key(wrong)


@pytest.mark.parametrize("x", [[[1.5, 2], [3, 4]], np.ones((2, 2), np.float32), jnp.ones((2, 2)), np.ma.ones((2, 2))])
def test_data_are_float64(x):
    array = checks.check_data(x, (2,), "x")
    assert type(array) is np.ndarray
    assert array.dtype == np.float64
    np.testing.assert_array_equal(array, np.asarray(x))


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (np.ma.masked_array(np.ones((3, 2)), np.eye(3, 2)), ValueError, "x is masked in places"),
        (np.ones(2), ValueError, r"x has shape \(2,\); this diffusion wants \(N, 2\)"),
        (np.ones((4, 3)), ValueError, r"x has shape \(4, 3\)"),
        (np.ones((4, 2, 1)), ValueError, r"x has shape \(4, 2, 1\)"),
        (np.ones((4, 2), int), TypeError, "x has dtype int64; .* dequantise integers"),
        (np.ones((4, 2), complex), TypeError, "x has dtype complex128; a density wants floating-point data$"),
        (np.ones((4, 2), bool), TypeError, "x has dtype bool"),
        (np.array([["a", "b"]]), TypeError, "x has dtype <U1"),
        (np.ones((1, 2)), ValueError, r"x has 1 row\(s\); it must have at least 2"),
        ([[1, 2], [np.nan, 3], [4.0, np.inf]], ValueError, r"2 entries .* in row\(s\) 1, 2 and column\(s\) a, b"),
        ([[1, 2], [3, -np.inf]], ValueError, r"1 entries .* in row\(s\) 1 and column\(s\) b"),
    ],
)
def test_bad_data_are_refused_with_their_rows_and_columns(x, error, words):
    with pytest.raises(error, match=words):
        checks.check_data(x, (2,), "x", 2, ["a", "b"])


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint64, np.float32, np.float64])
def test_bits_of_any_dtype_are_bytes(dtype):
    bits = np.array([[0, 1], [1, 1]])
    for array in (
        checks.check_bits(bits.astype(dtype), (2,), "x"),
        checks.check_support(bits.astype(dtype), (2,), constraints.boolean, "x"),
    ):
        assert array.dtype == np.uint8
        np.testing.assert_array_equal(array, bits)


def test_integers_are_bytes_where_they_fit():
    for low, high, dtype in ((0, 255, np.uint8), (0, 256, np.int64), (-1, 9, np.int64)):
        array = checks.check_support([[low], [high]], (1,), constraints.integer_interval(low, high), "x")
        assert array.dtype == dtype
        assert array.ravel().tolist() == [low, high]
    assert checks.check_support(np.array([[3.0]]), (1,), DIGITS, "x").dtype == np.uint8


def test_real_support_is_that_of_data():
    array = checks.check_support([[0.5], [-2.0]], (1,), constraints.real, "x")
    assert array.dtype == np.float64
    with pytest.raises(TypeError, match="dequantise integers"):
        checks.check_support([[0], [1]], (1,), constraints.real, "x")


@pytest.mark.parametrize(
    ("x", "support", "error", "words"),
    [
        ([[0], [2], [1]], constraints.boolean, ValueError, r"x has entries 2.0 in row\(s\) 1; bits are wanted, 0 or 1"),
        ([[0.0], [0.5]], constraints.boolean, ValueError, r"x has entries 0.5 in row\(s\) 1; bits are wanted"),
        ([["0"]], constraints.boolean, TypeError, "x has dtype <U1; bits are wanted"),
        ([[9], [10], [-1]], DIGITS, ValueError, r"x has entries -1.0, 10.0 in row\(s\) 1, 2; .*integers from"),
        ([[2.5]], DIGITS, ValueError, r"x has entries 2.5 in row\(s\) 0"),
        ([[1j]], DIGITS, TypeError, "x has dtype complex128; .*integers from"),
        ([[np.nan]], DIGITS, ValueError, "NaN or infinite"),
        ([0, 1], DIGITS, ValueError, r"x has shape \(2,\)"),
        (np.zeros((0, 1)), DIGITS, ValueError, r"x has 0 row\(s\)"),
        (np.ma.masked_array([[0], [1]], [[True], [False]]), constraints.boolean, ValueError, "x is masked in places"),
    ],
)
def test_what_is_outside_a_discrete_support_is_refused(x, support, error, words):
    with pytest.raises(error, match=words):
        checks.check_support(x, (1,), support, "x")


@pytest.mark.parametrize(
    ("x", "words"),
    [
        ([[1, 2], [1, 3]], r"the same value in every row of feature\(s\) a"),
        ([[1e300, 2], [-1e300, 3]], r"too large or too small to standardise in feature\(s\) a"),
    ],
)
def test_features_that_cannot_be_standardised_are_named(x, words):
    with pytest.raises(ValueError, match=words):
        checks.check_varies(np.array(x, float), "x", ["a", "b"])
    checks.check_varies(np.array([[1.0, 2.0], [2.0, 3.0]]), "x")


def test_some_are_five_and_how_many_more():
    assert checks.some([]) == ""
    assert checks.some(["a", "b"]) == "a, b"
    assert checks.some(np.arange(5)) == "0, 1, 2, 3, 4"
    assert checks.some(np.arange(7)) == "0, 1, 2, 3, 4 and 2 more"
