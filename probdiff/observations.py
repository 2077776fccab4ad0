"""Likelihoods of x_0 that a user states, in the data's own units, and what the filters are given for them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float

from probdiff import guidance
from probdiff.results import Fit
from probdiff.types import Key


@dataclass(frozen=True, eq=False)
class LinearGaussian:
    """y = A·x_0 + ε, ε normal with mean zero and standard deviation `noise`.

    `y` (M,) or (N, M); `A` (M, D), or (N, M, D) with one for each datum; x_0 a vector of size D, the data's own units.
    `noise` is a number, (M,), or a covariance matrix (M, M); zero means that A·x_0 is known exactly.
    """

    y: ArrayLike
    A: ArrayLike
    noise: ArrayLike


@dataclass(frozen=True, eq=False)
class Missing:
    """Rows of data x (N, *event_shape) in which some entries are NaN: the others are known exactly.

    The pattern may differ from row to row. The draws of a row without any known entry are the prior's.
    """

    x: ArrayLike


@dataclass(frozen=True, eq=False)
class BlackBox:
    """A log-likelihood that is called as a function is, of which no derivative is taken.

    It must be traceable by JAX; other code is called through `jax.pure_callback`, with `vmap_method="sequential"`.
    """

    log_likelihood: Callable[..., Any]


_ROUNDING = 1e-10  # of eigenvalues, over the largest

type Likelihood = LinearGaussian | Missing | BlackBox | Callable[..., Any]


def prepare(
    fit: Fit, likelihood: Likelihood, data: Any, rng_key: Key
) -> tuple[guidance.Observation, np.ndarray | None]:
    """The likelihood of each datum in the chain's own units, leaves with a leading axis of N."""
    loc, scale = fit.loc.ravel(), fit.scale.ravel()
    if isinstance(likelihood, LinearGaussian | Missing) and data is not None:
        raise ValueError(f"data are for a likelihood that is a function; {type(likelihood).__name__} has its own")
    if isinstance(likelihood, Missing):
        x = _known(fit, likelihood.x)
        known = ~np.isnan(x)
        y = np.where(known, (x - loc) / scale, 0.0)
        A, noise = known[:, :, None] * np.eye(len(loc)), ~known[:, :, None] * np.eye(len(loc))
        constant = np.sum(np.where(known, -np.log(scale), 0.5 * np.log(2 * np.pi)), 1)
        return guidance.Linear(*(jnp.asarray(a, jnp.result_type(float)) for a in (y, A, noise, constant))), x
    if isinstance(likelihood, LinearGaussian):
        y, A, noise = _linear(likelihood, len(loc))
        arrays = _sufficient(y - A @ loc, A * scale, noise)
        return guidance.Linear(*(jnp.asarray(a, jnp.result_type(float)) for a in arrays)), None
    function = likelihood.log_likelihood if isinstance(likelihood, BlackBox) else likelihood
    if not callable(function):
        raise TypeError(
            f"likelihood is {likelihood!r}; it must be LinearGaussian, Missing, BlackBox or a function of x_0"
        )
    units = jnp.asarray(fit.loc), jnp.asarray(fit.scale)
    log_g = _log_g(function, data is not None, *units)
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
    if data is not None and (len(sizes) != 1 or sizes <= {(), (0,)}):
        raise ValueError(f"data has leaves with leading axes {sorted(sizes)}; they must have one, of the same size N")
    datum = {"y": jnp.zeros(1) if data is None else jax.tree.map(jnp.asarray, data)}
    _check_function(log_g, datum, fit, rng_key, smooth=not isinstance(likelihood, BlackBox))
    return (guidance.Opaque if isinstance(likelihood, BlackBox) else guidance.Smooth)(datum, log_g), None


class _log_g:
    """The user's function at x_0 = loc + scale·z; equal to another of the same function and units, so compiled once."""

    def __init__(self, function: Callable[..., Any], takes_data: bool, loc: Any, scale: Any) -> None:
        self.function, self.takes_data, self.loc, self.scale = function, takes_data, loc, scale
        # of methods, which are made anew each time that they are named, by what they are made of
        parts = getattr(function, "__func__", function), getattr(function, "__self__", None)
        self._identity = (*map(id, parts), takes_data)

    def stated(self, z: Float[Any, " D"], datum: Any) -> Any:
        x_0 = self.loc + self.scale * z.reshape(self.loc.shape)
        return self.function(x_0, datum["y"]) if self.takes_data else self.function(x_0)

    def __call__(self, z: Float[Any, " D"], datum: Any) -> Float[Any, ""]:
        log_g = jnp.asarray(self.stated(z, datum), jnp.result_type(float))
        return jnp.where(jnp.isnan(log_g), -jnp.inf, log_g)

    def __hash__(self) -> int:
        return hash(self._identity)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _log_g)
            and self._identity == other._identity
            and np.array_equal(self.loc, other.loc)
            and np.array_equal(self.scale, other.scale)
        )


def _check_function(log_g: _log_g, datum: Any, fit: Fit, rng_key: Key, smooth: bool) -> None:
    """That it gives a number, and no NaN, at eight draws from the prior."""
    z = jnp.asarray((fit.sample(rng_key, 8) - fit.loc) / fit.scale, jnp.result_type(float)).reshape(8, -1)
    first = jax.tree.map(lambda leaf: leaf[0], datum)
    try:
        shape = getattr(jax.eval_shape(log_g.stated, z[0], first), "shape", None)
    except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError) as error:
        raise TypeError(
            "likelihood cannot be traced by JAX; call what is not written in JAX through "
            'BlackBox and jax.pure_callback(…, vmap_method="sequential")'
        ) from error
    if shape != ():
        raise ValueError(f"likelihood gives {'no array' if shape is None else f'shape {shape}'}; it must give a number")
    values = np.asarray(jax.vmap(lambda x: log_g.stated(x, first))(z))
    if np.isnan(values).any():
        raise ValueError(f"likelihood is NaN at {np.isnan(values).sum()} of 8 draws from the prior")
    if smooth:
        slopes = np.asarray(jax.vmap(jax.grad(lambda x: log_g(x, first)))(z))[np.isfinite(values)]
        if np.isnan(slopes).any():
            raise ValueError(
                "likelihood has a gradient of NaN at draws from the prior; give it as BlackBox(likelihood)"
            )


def _known(fit: Fit, x: ArrayLike) -> np.ndarray:
    """The table (N, D) with NaN where an entry is missing, checked."""
    array = np.asarray(x)
    if array.dtype.kind != "f":
        raise TypeError(f"x has dtype {array.dtype}; missing entries are NaN, in floating-point data")
    missing = np.isnan(array)
    fit.diffusion.family.checked(np.where(missing, 0.0, array), "x")
    return array.reshape(len(array), -1).astype(np.float64)


def _linear(likelihood: LinearGaussian, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y (N, M), A (N, M, D) and a factor of the noise's covariance (N, M, M), checked."""
    y, A, noise = (np.asarray(a, np.float64) for a in (likelihood.y, likelihood.A, likelihood.noise))
    for name, array in (("y", y), ("A", A), ("noise", noise)):
        if not np.isfinite(array).all():
            raise ValueError(f"{name} has entries that are NaN or infinite")
    y = y[None] if y.ndim == 1 else y
    if y.ndim != 2 or not y.size:
        raise ValueError(f"y has shape {np.shape(likelihood.y)}; it must be (M,) or (N, M)")
    N, M = y.shape
    if A.shape not in ((M, size), (N, M, size)):
        raise ValueError(f"A has shape {A.shape}; for y of shape {y.shape} it must be {(M, size)} or {(N, M, size)}")
    if noise.shape in ((), (M,)):
        if np.any(noise < 0):
            raise ValueError(f"noise is {noise}; a standard deviation must not be negative")
        factor = np.diag(np.broadcast_to(noise, (M,)))
    elif noise.shape == (M, M):
        values, vectors = np.linalg.eigh(noise)
        if not np.allclose(noise, noise.T) or values[0] < -_ROUNDING * values[-1]:
            raise ValueError("noise is no covariance matrix: it must be symmetric, without negative eigenvalues")
        factor = vectors * np.sqrt(np.where(values > _ROUNDING * values[-1], values, 0.0))
    else:
        raise ValueError(f"noise has shape {noise.shape}; it must be a number, ({M},) or ({M}, {M})")
    A = np.broadcast_to(A, (N, M, size))
    if (
        np.linalg.matrix_rank(factor) < M
        and np.min(np.linalg.matrix_rank(np.dstack([A, factor[None].repeat(N, 0)]))) < M
    ):
        raise ValueError("A and noise leave a combination of y without a density: rows of A must be independent there")
    return y, A, np.broadcast_to(factor, (N, M, M))


def _sufficient(
    y: np.ndarray, A: np.ndarray, noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """No more than D numbers that say the same of x_0 as y (N, M) does, their A and noise, and the rest of log p(y)."""
    (N, M), D = y.shape, A.shape[2]
    if M <= D or np.linalg.matrix_rank(noise).min() < M:
        return y, A, noise, np.zeros(N)
    white = np.linalg.solve(noise, y[..., None])[..., 0]
    Q, triangular = np.linalg.qr(np.linalg.solve(noise, A))
    kept = np.einsum("nmd,nm->nd", Q, white)
    left = np.sum(white**2, 1) - np.sum(kept**2, 1) + (M - D) * np.log(2 * np.pi)
    return kept, triangular, np.tile(np.eye(D), (N, 1, 1)), -0.5 * left - np.linalg.slogdet(noise)[1]
