"""Likelihoods of x_0 as a user states them, in the data's own units, and the step to their guided forms."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Float
from numpy.typing import ArrayLike

from probdiff.checks import frame_values, is_frame, some
from probdiff.identity import value_of
from probdiff.posterior.guidance import (
    GuidedBlackBox,
    GuidedLikelihood,
    GuidedLinearGaussian,
    GuidedMissing,
    GuidedSmooth,
)
from probdiff.results import Fit
from probdiff.types import Key
from probdiff.units import Units, to_chain, warn_of_precision


@dataclass(frozen=True, eq=False)
class LinearGaussian:
    """y = A·x_0 + ε, ε normal with mean zero and standard deviation `noise`.

    `y` (M,) or (N, M); `A` (M, D), or (N, M, D) with one for each datum; x_0 a vector of size D, the data's own units.
    The columns of a data frame `A` are taken by name.
    `noise` is a number, (M,), or a covariance matrix (M, M); zero means that A·x_0 is known exactly.
    """

    y: ArrayLike
    A: ArrayLike
    noise: ArrayLike


@dataclass(frozen=True, eq=False)
class Missing:
    """Rows of data x (N, *event_shape) in which some entries are NaN, or masked: the others are known exactly.

    The pattern may differ from row to row. The draws of a row without any known entry are the prior's.
    """

    x: ArrayLike


@dataclass(frozen=True, eq=False)
class BlackBox:
    """A log-likelihood that is called as a function is; no derivative of it is taken.

    It must be traceable by JAX; other code is called through `jax.pure_callback`, with `vmap_method="sequential"`.
    """

    log_likelihood: Callable[..., Any]


_ROUNDING = 1e-10  # eigenvalues below this share of the largest count as zero

type Likelihood = LinearGaussian | Missing | BlackBox | Callable[..., Any]


def prepare(fit: Fit, likelihood: Likelihood, data: Any, rng_key: Key) -> tuple[GuidedLikelihood, np.ndarray | None]:
    """The guided form of the likelihood of each datum, its leaves with a leading axis of N, and what is known of x_0.

    The latter, (N, D) with NaN where an entry is missing, is None but for `Missing`. Raises `ValueError` or `TypeError`
    where the likelihood, its arrays or `data` do not fit the fit.
    """
    units = fit.units.flat
    data = {name: data[name].to_numpy() for name in data.columns} if is_frame(data) else data
    if isinstance(likelihood, LinearGaussian | Missing) and data is not None:
        raise ValueError(f"data are for a likelihood that is a function; {type(likelihood).__name__} has its own")
    if isinstance(likelihood, Missing):
        x = known_entries(fit, likelihood.x)
        known = ~np.isnan(x)
        # features are known, whatever axes the chain has
        z = to_chain(fit.diffusion, x.reshape(-1, *fit.loc.shape), fit.units._replace(axes=None)).reshape(x.shape)
        constant = np.sum(np.where(known, -np.log(units.scale), 0.5 * np.log(2 * np.pi)), 1)
        floats = [jnp.asarray(a, jnp.result_type(float)) for a in (np.where(known, z, 0.0), constant)]
        axes: Any = units.axes
        if axes is not None:  # a view, since there is one for each datum
            axes = np.broadcast_to(axes.astype(floats[0].dtype), (len(x), *axes.shape))
        return GuidedMissing(floats[0], jnp.asarray(known), floats[1], axes), x
    if isinstance(likelihood, LinearGaussian):
        arrays = _linear(likelihood, units, fit.features)
        return GuidedLinearGaussian(*(jnp.asarray(a, jnp.result_type(float)) for a in arrays)), None
    function = likelihood.log_likelihood if isinstance(likelihood, BlackBox) else likelihood
    if not callable(function) or isinstance(function, dist.Distribution):
        raise TypeError(
            f"likelihood is {likelihood!r}; it must be LinearGaussian, Missing, BlackBox or a function of x_0"
        )
    warn_of_precision(fit.loc, fit.scale, fit.features)
    log_g = _InChainUnits(function, data is not None, fit.units)
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
    if wrong := [dtype for leaf in jax.tree.leaves(data) if (dtype := np.asarray(leaf).dtype).kind not in "biufcV"]:
        raise TypeError(f"data has a leaf of dtype {wrong[0]}; numbers are wanted")
    if data is not None and (len(sizes) != 1 or sizes <= {(), (0,)}):
        raise ValueError(f"data has leaves with leading axes {sorted(sizes)}; they must have one, of the same size N")
    datum = {"y": jnp.zeros(1) if data is None else jax.tree.map(jnp.asarray, data)}
    _check_function(log_g, datum, fit, rng_key, smooth=not isinstance(likelihood, BlackBox))
    return (GuidedBlackBox if isinstance(likelihood, BlackBox) else GuidedSmooth)(datum, log_g), None


@dataclass(frozen=True, eq=False)
class _InChainUnits:
    """A user's log g as a function of z, which is x_0 in the chain's own units, and of a datum.

    Programs are compiled once for all that are equal: those of the same function in the same units.
    """

    function: Callable[..., Any]
    takes_data: bool
    units: Units

    def stated(self, z: Float[Any, " D"], datum: Any) -> Any:
        """What the function gives, as it is."""
        x_0 = jax.tree.map(jnp.asarray, self.units).to_data(z.reshape(self.units.loc.shape))
        return self.function(x_0, datum["y"]) if self.takes_data else self.function(x_0)

    def __call__(self, z: Float[Any, " D"], datum: Any) -> Float[Any, ""]:
        """log g, with −∞ where the function gives NaN."""
        log_g = jnp.asarray(self.stated(z, datum), jnp.result_type(float))
        return jnp.where(jnp.isnan(log_g), -jnp.inf, log_g)

    @property
    def _parts(self) -> tuple[Any, Any]:
        """What the function is made of: a method is made anew each time that it is named, its parts are not."""
        return getattr(self.function, "__func__", self.function), getattr(self.function, "__self__", None)

    def __hash__(self) -> int:
        # by identity, since a function may be an Equinox module, whose arrays have no hash
        return hash((*map(id, self._parts), self.takes_data))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _InChainUnits)
            and all(mine is others for mine, others in zip(self._parts, other._parts, strict=True))
            and self.takes_data == other.takes_data
            and value_of(self.units) == value_of(other.units)
        )


def _check_function(log_g: _InChainUnits, data: Any, fit: Fit, rng_key: Key, smooth: bool) -> None:
    """Raises unless log g takes x_0 and a datum, and is a number and not NaN or +∞ at eight draws from p for each."""
    draws = fit.sample(rng_key, 8)
    z = jnp.asarray(fit.units.to_chain(draws), jnp.result_type(float)).reshape(8, -1)
    first = jax.tree.map(lambda leaf: leaf[0], data)
    arguments = draws[0].astype(z.dtype), jax.tree.map(np.asarray, first["y"])
    _check_call(log_g.function, arguments if log_g.takes_data else arguments[:1])
    try:
        result = jax.eval_shape(log_g.stated, z[0], first)
        if not isinstance(result, jax.ShapeDtypeStruct) or result.shape:
            given = f"shape {result.shape}" if isinstance(result, jax.ShapeDtypeStruct) else "no array"
            raise ValueError(f"likelihood gives {given}; it must give a number")
        values = np.asarray(_values(log_g, z, data))
    except (
        jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError, NotImplementedError
    ) as error:  # fmt: skip
        raise TypeError(
            "likelihood cannot be traced by JAX; call what is not written in JAX through "
            'BlackBox and jax.pure_callback(…, vmap_method="sequential")'
        ) from error
    for kind, wrong in (("NaN", np.isnan(values)), ("infinite", values == np.inf)):
        if wrong.any():
            rows = np.flatnonzero(wrong.any(1))
            where = f", for row(s) {some(rows)} of data" if log_g.takes_data else ""
            raise ValueError(
                f"likelihood is {kind} at {wrong[rows[0]].sum()} of 8 draws from the prior{where}; "
                "its logarithm is wanted, −∞ where it is zero"
            )
    if smooth:
        try:
            gradients = np.asarray(_gradients(log_g, z, data))
        except Exception as error:
            why = (str(error) or repr(error)).splitlines()[0]
            raise TypeError(
                f"likelihood cannot be differentiated twice by JAX ({why}); give it as BlackBox(likelihood)"
            ) from error
        if np.isnan(gradients[np.isfinite(values)]).any():
            raise ValueError(
                "likelihood has a gradient of NaN at draws from the prior; give it as BlackBox(likelihood)"
            )


@partial(jax.jit, static_argnums=0)
def _values(log_g: _InChainUnits, z: Float[Any, "S D"], data: Any) -> Float[Any, "N S"]:
    """What the function gives for each datum at each draw."""
    return jax.vmap(jax.vmap(log_g.stated, (0, None)), (None, 0))(z, data)


@partial(jax.jit, static_argnums=0)
def _gradients(log_g: _InChainUnits, z: Float[Any, "S D"], data: Any) -> Float[Any, "N S D"]:
    """Its gradients; raises while it is traced where a second derivative cannot be had."""
    jax.eval_shape(jax.hessian(log_g), z[0], jax.tree.map(lambda leaf: leaf[0], data))
    return jax.vmap(jax.vmap(jax.grad(log_g), (0, None)), (None, 0))(z, data)


def _check_call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Raises unless the function takes so many arguments, and takes no entry that is not there.

    JAX would take the last entry for one that is out of bounds.
    """
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        called = "f(x_0, datum), as there are data" if len(arguments) > 1 else "f(x_0), as there are no data"
        raise TypeError(f"likelihood is called as {called}: {error}") from error
    except ValueError:
        pass  # some callables do not tell their arguments
    try:
        with np.errstate(all="ignore"):
            function(*arguments)
    except IndexError as error:
        raise ValueError(f"likelihood takes an entry that is not there: {error}") from error
    except Exception:
        pass  # a function of JAX arrays may not take NumPy's


def known_entries(fit: Fit, x: ArrayLike) -> np.ndarray:
    """The table (N, D), checked, with NaN where an entry is missing or masked."""
    x = frame_values(x, "x", fit.features)
    masked = isinstance(x, np.ma.MaskedArray) and x.dtype.kind == "f"
    array = np.ma.filled(x, np.nan) if masked else np.asarray(x)
    if array.dtype.kind != "f":
        raise TypeError(f"x has dtype {array.dtype}; missing entries are NaN, in floating-point data")
    fit.diffusion.checked(np.where(np.isfinite(array), array, 0.0), "x")
    flat = array.reshape(len(array), -1).astype(np.float64)
    if np.isinf(flat).any():
        raise ValueError(f"x has infinite entries, in row(s) {some(np.flatnonzero(np.isinf(flat).any(1)))}")
    return flat


def _linear(
    likelihood: LinearGaussian, units: Units, features: tuple[str, ...] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """y (N, M), A (N, M, D), a factor (N, M, M) of the covariance of the noise, and a constant (N,) of log p(y).

    They are checked, and A is of z, which is x_0 in the chain's own units. Each measurement is in units of the
    standard deviation that it would have if z were standard normal; the constant is minus the sum of the logarithms of
    these units.
    """
    size = units.loc.size
    given = {"y": likelihood.y, "A": frame_values(likelihood.A, "A", features), "noise": likelihood.noise}
    arrays = {name: np.asarray(array) for name, array in given.items()}
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise TypeError(f"{name} has dtype {array.dtype}; it must be of real numbers")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} has entries that are NaN or infinite")
    y, A, noise = (array.astype(np.float64) for array in arrays.values())
    y = y[None] if y.ndim == 1 else y
    if y.ndim != 2 or not y.size:
        raise ValueError(f"y has shape {np.shape(likelihood.y)}; it must be (M,) or (N, M)")
    N, M = y.shape
    if A.shape not in ((M, size), (N, M, size)):
        raise ValueError(f"A has shape {A.shape}; for y of shape {y.shape} it must be {(M, size)} or {(N, M, size)}")
    factor = _factor(noise, M)
    y, A = y - A @ units.loc, np.reshape(A * units.scale, (-1, M, size))  # one for all data, or one for each
    A = A if units.axes is None else A @ units.axes
    both = np.concatenate([A, np.broadcast_to(factor, (len(A), M, M))], axis=2)
    own = np.abs(both).max(2)  # whose square may be no number
    own *= np.linalg.norm(both / np.where(own > 0, own, 1.0)[..., None], axis=2)
    both /= np.where(own > 0, own, 1.0)[..., None]
    if np.linalg.matrix_rank(factor) < M and np.linalg.matrix_rank(both).min() < M:
        raise ValueError("A and noise leave a combination of y without a density: rows of A must be independent there")
    y, A, factor, constant = _sufficient(y / own, both[..., :size], both[..., size:])
    return y, A, factor, constant - np.log(own).sum(1)


def _factor(noise: np.ndarray, M: int) -> np.ndarray:
    """A factor (M, M) of the covariance of the noise."""
    if noise.shape in ((), (M,)):
        if np.any(noise < 0):
            raise ValueError(f"noise is {noise}; a standard deviation must not be negative")
        return np.diag(np.broadcast_to(noise, (M,)))
    if noise.shape != (M, M):
        raise ValueError(f"noise has shape {noise.shape}; it must be a number, ({M},) or ({M}, {M})")
    variance = np.diag(noise)
    own = np.sqrt(np.where(variance > 0, variance, 1.0))
    correlation = noise / own / own[:, None]
    values, vectors = np.linalg.eigh(correlation)
    if np.any(variance < 0) or not np.allclose(correlation, correlation.T) or values[0] < -_ROUNDING * values[-1]:
        raise ValueError("noise is no covariance matrix: it must be symmetric, without negative eigenvalues")
    return own[:, None] * vectors * np.sqrt(np.where(values > _ROUNDING * values[-1], values, 0.0))


def _sufficient(
    y: np.ndarray, A: np.ndarray, noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """y, A and noise of at most D numbers that say the same of x_0 as y (N, M) does, and the rest of log p(y), (N,).

    A and noise have a leading axis of N, or of one where they are the same for all; all that is returned has N.
    """
    (N, M), D = y.shape, A.shape[2]
    if M <= D or np.linalg.matrix_rank(noise).min() < M:
        return y, np.broadcast_to(A, (N, M, D)), np.broadcast_to(noise, (N, M, M)), np.zeros(N)
    white = np.linalg.solve(noise, y[..., None])[..., 0]
    Q, triangular = np.linalg.qr(np.linalg.solve(noise, A))
    kept = np.sum(Q * white[..., None], 1)
    left_over = white - np.sum(Q * kept[:, None], 2)
    rest = np.sum(left_over**2, 1) + (M - D) * np.log(2 * np.pi)
    constant = -0.5 * rest - np.linalg.slogdet(noise)[1]
    return kept, np.broadcast_to(triangular, (N, D, D)), np.tile(np.eye(D), (N, 1, 1)), constant
