"""p(x_0) from weighted paths: multi-sample lower and upper bounds, and sequential Monte Carlo along the chain."""

from collections.abc import Callable, Iterator
from functools import partial

import arviz  # noqa: F401  # gives xarray its azstats
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import xarray as xr
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.infer.elbo import get_importance_log_probs
from scipy.special import logsumexp

from probdiff.chains import Diffusion
from probdiff.families import Twist
from probdiff.likelihood import LogLikelihood, block_size, in_blocks, log_mean
from probdiff.schedules import NoiseLevels
from probdiff.types import Data, Event, Key, Params, Time

_ROWS = 256  # triangular solves over more rows at once are many times slower on a CPU
_FULL = 16  # features up to which a twist has all products of two features
_POINTS = 8  # for each coefficient of a twist
_EQUAL = 1e-4  # spread of the largest log weights, of which none then stands out
_TIE = 1e-5  # log weights no further apart are of the same path but for rounding
_LEAST_SIZE = 0.5  # effective particles over particles below which they are resampled


@partial(jax.jit, static_argnums=0)
def _log_weights(d: Diffusion, params: Params, x_0: Data, rng_keys: Key) -> Float[Array, "S N"]:
    def one(rng_key: Key) -> Float[Array, " N"]:
        key_p, key_q = jax.random.split(rng_key)
        model = handlers.seed(partial(d.reverse, stacked=True), key_p)
        guide = handlers.seed(partial(d.forward_posterior, stacked=True), key_q)
        log_p, log_q = get_importance_log_probs(model, guide, (x_0,), {}, params)
        path = lambda log_probs: sum(v if v.ndim == 1 else v.sum(0) for v in log_probs.values())  # noqa: E731
        return path(log_p) - path(log_q)

    # few rows alone would be all overhead
    return jax.lax.map(one, rng_keys, batch_size=max(1, _ROWS // len(x_0)))


@partial(jax.jit, static_argnums=0)
def _log_weight_of(d: Diffusion, params: Params, paths: Float[Array, "N T+1 *event"]) -> Float[Array, " N"]:
    """log p(x_0…x_T) − log q(x_1…x_T given x_0) of given paths, as N13 and N5 have it."""
    noise, kernel = handlers.substitute(d.kernels, data=params)()
    x = jnp.moveaxis(paths, 1, 0)

    def term(args: tuple[Event, Event, Array]) -> Float[Array, " N"]:
        x_prev, x_t, t = args
        return kernel(x_t, t).log_prob(x_prev) - d.family.step(x_prev, noise, t).log_prob(x_t)

    terms = jax.lax.map(term, (x[:-1], x[1:], jnp.arange(1, d.num_timesteps + 1)))
    return d.family.prior(x.shape[1:2]).log_prob(x[-1]) + terms.sum(0)


def _weights_in_blocks(
    d: Diffusion, params: Params, x_0: Data, rng_key: Key, num_draws: int
) -> Iterator[Float[np.ndarray, "S n"]]:
    draw = lambda x, key: np.asarray(_log_weights(d, params, x, jax.random.split(key, num_draws)))  # noqa: E731
    for n, log_w in in_blocks(x_0, rng_key, draw, block_size(len(x_0), _ROWS)):
        yield log_w[:, :n].astype(np.float64)


def log_importance_weights(
    d: Diffusion, params: Params, x_0: Data, *, rng_key: Key, num_draws: int
) -> Float[np.ndarray, "S N"]:
    """log w = log p(x_0…x_T) − log q(x_1…x_T given x_0) for `num_draws` paths per datum, N14; shape (S, N), nats."""
    return np.concatenate(list(_weights_in_blocks(d, params, x_0, rng_key, num_draws)), axis=1)


def iwae(d: Diffusion, params: Params, x_0: Data, *, rng_key: Key, num_particles: int) -> LogLikelihood:
    """The multi-sample bound E log (1/S) Σ_s w_s ≤ log p(x_0), w of N14 from S whole paths (Burda et al. 2016).

    It rises to log p(x_0) with S, from the ELBO at S = 1; here S is at least 2.
    x_0 (N, *event_shape) in the chain's own units; nats.
    """
    blocks = [(*log_mean(log_w), _k_of(log_w)) for log_w in _weights_in_blocks(d, params, x_0, rng_key, num_particles)]
    values, mcse, k = (np.concatenate(part) for part in zip(*blocks, strict=True))
    return LogLikelihood(values, mcse, "lower bound", k)


def upper(
    d: Diffusion,
    params: Params,
    paths: Float[np.ndarray, "N T+1 *event"],
    *,
    rng_key: Key,
    num_particles: int,
) -> LogLikelihood:
    """The upper bound log p(x_0) ≤ E log (1/S) Σ_s w_s in which the first path is drawn from p(x_1…x_T given x_0).

    The other S − 1 are drawn from q (bidirectional Monte Carlo: Grosse, Ghahramani and Adams 2015).
    `paths` (N, T+1, *event_shape), x_0 first, must be ancestral draws from p: then x_1…x_T is an exact posterior draw
    given its x_0. For other x_0 no such draw is known, and there is no bound. S is at least 3. The stated error of the
    first weight is extrapolated from the others, and not to be relied on where their k̂ is high.
    Chain's own units; nats.
    """
    blocks, S = [], num_particles
    rows = block_size(len(paths), _ROWS)
    of_p = in_blocks(paths, rng_key, lambda x, _: np.asarray(_log_weight_of(d, params, x)), rows)
    of_q = _weights_in_blocks(d, params, paths[:, 0], rng_key, S - 1)
    for (n, first), others in zip(of_p, of_q, strict=True):
        log_w = np.concatenate([first[None, :n], others])
        values = logsumexp(log_w, axis=0) - np.log(S)
        w = np.exp(log_w - values)
        posterior = w / w.sum(0)
        spread = np.sum(posterior * w**2, 0) - np.sum(posterior * w, 0) ** 2  # of the first weight
        blocks.append((values, np.sqrt(spread + (S - 1) * w[1:].var(0, ddof=1)) / S, _k_of(others)))
    values, mcse, k = (np.concatenate(part) for part in zip(*blocks, strict=True))
    return LogLikelihood(values, mcse, "upper bound", k)


def smc(d: Diffusion, params: Params, x_0: Data, *, rng_key: Key, num_particles: int, num_draws: int) -> LogLikelihood:
    """An estimate of p(x_0), unbiased, by `num_draws` particle filters of `num_particles` along the chain.

    A filter runs from x_T to x_1 with the targets p(x_t…x_T)·ψ_t(x_t) and the proposals p(x_{t−1} given x_t)·ψ_{t−1}.
    log ψ_t is a quadratic of x_t fitted, from t = 1 up, to log p(x_0 given x_1) and to
    log ∫ p(x_{t−1} given x_t)·ψ_{t−1}(x_{t−1}) dx_{t−1} at draws from q(x_t given x_0), so that ψ_t is nearly
    p(x_0 given x_t) (Guarniero, Johansen and Lee 2017; Heng et al. 2020): for linear-Gaussian chains up to the ridge of
    the fit. Beyond 16 features the quadratic has no products of two features.
    Particles are resampled, systematically, where their effective number falls below half. Where no quadratic is near
    p(x_0 given x_t), whole paths from q are the better particles: for each datum a first run of both
    finds the one of less spread, and a second run, independent of it, counts. Values are the log of the mean over
    filters, with the standard error from their spread; they are low by half its square, to first order.
    x_0 (N, *event_shape) in the chain's own units; nats.
    """
    S, R, size = num_particles, num_draws, int(np.prod(d.event_shape))
    square = len(d.family.twist_products(_FULL)[0]) > size or d.family.options.get("covariance") == "full"
    rows = block_size(len(x_0), max(1, min(_ROWS, 2**21 // (R * S * size * (size if square else 1)))))

    def twisted(x: Data, rng_key: Key) -> Float[np.ndarray, "R n"]:
        run = lambda x, key: np.asarray(_filters(d, params, x, jax.random.split(key, rows), S, R), np.float64)  # noqa: E731
        return np.concatenate([log_p[:n] for n, log_p in in_blocks(x, rng_key, run, rows)]).T

    def whole(x: Data, rng_key: Key) -> Float[np.ndarray, "R n"]:
        draws = (log_w.reshape(R, S, -1) for log_w in _weights_in_blocks(d, params, x, rng_key, R * S))
        return np.concatenate([logsumexp(log_w, axis=1) - np.log(S) for log_w in draws], axis=1)

    keys = jax.random.split(rng_key, (2, 2))
    spread = [log_mean(run(x_0, key))[1] for run, key in zip((twisted, whole), keys[0], strict=True)]
    better = np.argmin(np.where(np.isnan(spread), np.inf, spread), axis=0)
    values, mcse = np.empty((2, len(x_0)))
    for i, run in enumerate((twisted, whole)):
        if np.any(better == i):
            values[better == i], mcse[better == i] = log_mean(run(x_0[better == i], keys[1, i]))
    return LogLikelihood(values, mcse, "estimate")


@partial(jax.jit, static_argnums=(0, 4, 5))
def _filters(
    d: Diffusion, params: Params, x_0: Data, rng_keys: Key, num_particles: int, num_draws: int
) -> Float[Array, "N R"]:
    """log p̂(x_0) of each filter, for each datum."""
    noise, kernel = handlers.substitute(d.kernels, data=params)()

    def one_datum(x_0: Event, rng_key: Key) -> Float[Array, " R"]:
        key_twists, key_filters = jax.random.split(rng_key)
        twists = _twists(d, noise, kernel, x_0, key_twists)
        one = lambda key: _filter(d, kernel, twists, x_0, key, num_particles)  # noqa: E731
        return jax.vmap(one)(jax.random.split(key_filters, num_draws))

    return jax.vmap(one_datum)(jnp.asarray(x_0), rng_keys)


type Kernel = Callable[[Event, Time], dist.Distribution]


def _twists(d: Diffusion, noise: NoiseLevels, kernel: Kernel, x_0: Event, rng_key: Key) -> Twist:
    """ψ_1…ψ_T, each leaf with a leading axis of T."""
    size = x_0.size
    rows, columns = d.family.twist_products(_FULL)
    full = len(rows) > size or size == 1
    num_points = max(500, _POINTS * (1 + size + len(rows)))

    def fit(below: Twist, args: tuple[Array, Key]) -> tuple[Twist, Twist]:
        t, key = args
        x, loc, std = d.family.twist_points(x_0, noise, t, key, num_points)
        z = (x - loc) / std
        p = kernel(x.reshape(num_points, *x_0.shape), t)
        wanted = jnp.where(t == 1, p.log_prob(x_0), d.family.tilted(p, below)[1])
        # orthogonal at draws from q(x_t given x_0): Hermite polynomials where that is Gaussian
        products = z[:, rows] * z[:, columns] - (rows == columns)
        features = jnp.concatenate([jnp.ones((num_points, 1)), z, products], 1)
        gram = features.T @ features / num_points + 1e-4 * jnp.eye(features.shape[1])
        mean = wanted.mean()  # solved for apart, to keep digits
        solution = jnp.linalg.solve(gram, features.T @ (wanted - mean) / num_points)
        constant, linear, bend = solution[0] + mean, solution[1 : 1 + size], solution[1 + size :]
        constant = constant - jnp.sum(jnp.where(rows == columns, bend, 0))
        # held convex, so that every tilted kernel is a density
        if full:
            curvature = jnp.zeros((size, size)).at[rows, columns].add(-bend).at[columns, rows].add(-bend)
            values, vectors = jnp.linalg.eigh(curvature)
            curvature = (vectors * jnp.maximum(values, 0)) @ vectors.T
        else:
            curvature = jnp.maximum(-2 * bend, 0) if len(rows) else jnp.zeros(size)
        twist = Twist(loc, std, constant, linear, curvature)
        return twist, twist

    blank = jnp.zeros((size, size) if full else size)
    std = jax.eval_shape(lambda: d.family.twist_points(x_0, noise, 1, rng_key, 1))[2]
    start = Twist(jnp.zeros(size), jnp.ones(std.shape), jnp.zeros(()), jnp.zeros(size), blank)
    T = d.num_timesteps
    return jax.lax.scan(fit, start, (jnp.arange(1, T + 1), jax.random.split(rng_key, T)))[1]


def _filter(
    d: Diffusion, kernel: Kernel, twists: Twist, x_0: Event, rng_key: Key, num_particles: int
) -> Float[Array, ""]:
    """log p̂(x_0) of one filter."""
    from blackjax.smc.resampling import systematic  # slow to import, and only this wants it

    T, S = d.num_timesteps, num_particles
    twist_at = lambda t: jax.tree.map(lambda leaf: leaf[t - 1], twists)  # noqa: E731

    def step(carry: tuple[Array, Array, Array], args: tuple[Array, Key]) -> tuple[tuple[Array, Array, Array], None]:
        x_t, log_w, log_p = carry
        t, key = args
        key_resample, key_move = jax.random.split(key)
        p = kernel(x_t.reshape(S, *x_0.shape), t)
        proposal, log_mass = d.family.tilted(p, twist_at(jnp.maximum(t - 1, 1)))
        log_w = log_w + jnp.where(t == 1, p.log_prob(x_0), log_mass) - twist_at(t)(x_t)
        shares = jax.nn.softmax(log_w)
        resample = (t > 1) & (1 / jnp.sum(shares**2) < _LEAST_SIZE * S)
        parents = jnp.where(resample, systematic(key_resample, shares, S), jnp.arange(S))
        log_p = log_p + jnp.where(resample, jax.nn.logsumexp(log_w) - jnp.log(S), 0.0)
        log_w = jnp.where(resample, 0.0, log_w)
        x_prev = jax.tree.map(lambda leaf: leaf[parents], proposal).sample(key_move)
        return (x_prev, log_w, log_p), None

    key_first, key_steps = jax.random.split(rng_key)
    first, log_mass = d.family.tilted(d.family.prior((S,)), twist_at(T))
    start = (first.sample(key_first), log_mass, jnp.zeros(()))
    (_, log_w, log_p), _ = jax.lax.scan(step, start, (jnp.arange(T, 0, -1), jax.random.split(key_steps, T)))
    return log_p + jax.nn.logsumexp(log_w) - jnp.log(S)


def _k_of(log_w: Float[np.ndarray, "S N"]) -> Float[np.ndarray, " N"]:
    """k̂ of the draws for each datum; NaN where they are too few to have a tail."""
    if len(log_w) < 25:
        return np.full(log_w.shape[1], np.nan)
    return pareto_k(xr.DataArray(log_w, dims=("draw", "datum"))).to_numpy()


def pareto_k(log_weight: xr.DataArray) -> xr.DataArray:
    """Pareto k̂ of the importance weights of each datum, from draws of log w; dims chain, datum.

    −∞ where the largest weights are equal, and ∞ where no tail can be fitted: they are worlds apart, or few positive.
    Below `k_threshold` an importance-weighted estimate from these draws can be trusted (Vehtari et al. 2024).
    """
    S = log_weight.sizes["draw"]
    tail = int(3 * S**0.5) if S > 225 else S // 5  # as ArviZ has it
    largest = xr.apply_ufunc(np.sort, log_weight, input_core_dims=[["draw"]], output_core_dims=[["draw"]])
    largest = largest.isel(draw=slice(-tail, None))
    positive = largest.where(largest != -np.inf)
    spread = (positive.max("draw") - positive.min("draw")).where(largest.notnull().all("draw"))
    equal = spread < _EQUAL
    whole = positive.notnull().all("draw")
    wiggle = xr.DataArray(np.linspace(0, 1e-3, S), dims="draw")
    log_weight = xr.apply_ufunc(_without_ties, log_weight, input_core_dims=[["draw"]], output_core_dims=[["draw"]])
    with np.errstate(over="ignore", invalid="ignore"):
        _, k = (-log_weight.where(~equal, wiggle)).azstats.psislw(dim=["draw"])
    return k.where(~equal).fillna(np.inf).where(~(equal & whole), -np.inf)


def _without_ties(log_w: Float[np.ndarray, "*batch S"]) -> Float[np.ndarray, "*batch S"]:
    """log w, where most draws share their value with others, as of few bits, spread half-way to the values beside it.

    A tail of ties has no k̂; spread out it has that of the weights' distribution function, made continuous.
    """
    rows = np.array(log_w).reshape(-1, log_w.shape[-1])
    for whole in rows:
        positive = whole != -np.inf
        row = whole[positive]
        if not row.size or not np.isfinite(row).all():
            continue
        order = np.argsort(row, kind="stable")
        new = np.append(True, np.diff(row[order]) > _TIE)
        values, group = row[order][new], np.cumsum(new) - 1
        together = row[order] - values[group] < 10 * _TIE  # else they lie densely, and are no ties
        if new.mean() > 0.5 or len(values) == 1 or not together.all():
            continue
        middle = (values[1:] + values[:-1]) / 2
        lower = np.concatenate([[2 * values[0] - middle[0]], middle])
        upper = np.concatenate([middle, [2 * values[-1] - middle[-1]]])
        count = np.bincount(group)
        place = (np.arange(len(row)) - (np.cumsum(count) - count)[group] + 0.5) / count[group]
        row[order] = lower[group] + place * (upper - lower)[group]
        whole[positive] = row
    return rows.reshape(log_w.shape)


def k_threshold(num_draws: int) -> float:
    """min(1 − 1/log₁₀ S, 0.7) for S draws (Vehtari et al. 2024)."""
    return min(1 - 1 / np.log10(num_draws), 0.7)
