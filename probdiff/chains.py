"""The forward chain q and the reverse chain p as NumPyro programs.

Each method of a diffusion is a NumPyro program: give it to `SVI`, `Predictive`, `handlers.trace` or any other tool.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpy.typing import ArrayLike
from numpyro import handlers

from probdiff.at_time import draw_times, score_term
from probdiff.checks import check_support
from probdiff.families import compiled
from probdiff.families.base import Family, ForwardStep, as_state, in_form_of, state_dtype
from probdiff.families.binomial import Binomial
from probdiff.families.gaussian import Covariance, Gaussian
from probdiff.identity import ByValue
from probdiff.locks import LOCK
from probdiff.networks.gaussian_start import GaussianStart, of_network
from probdiff.networks.residual_mlp import Recipe
from probdiff.noncentred import ancestral
from probdiff.schedules import NoiseLevels, Schedule
from probdiff.stacked import scan_site, where
from probdiff.types import Event, Key, Params, Time


@dataclass(frozen=True, eq=False)
class Diffusion(ByValue):
    """The pair of chains q (N3, N5) and p (N7, N8, N13) over x_0…x_T of any family.

    `network` is a recipe such as `networks.ResidualMLP()` or an Equinox module with the signature that
    `networks` documents.

    Every program takes `x_0` of shape `event_shape` (one datum) or (N, *event_shape), whose rows are
    the plate "data" of size N, of which `subsample_size` draws a part. `stacked=True` gives the same
    density with one site "x" whose leading axis is time, in the order of the explicit sites, by `scan`:
    the body is compiled once, whatever T is. Params: those of the schedule, and "network$params".

    Raises `ValueError` or `TypeError` for an x_0 of another shape or of a dtype that the family has no use for.
    """

    event_shape: tuple[int, ...]
    schedule: Schedule
    network: Recipe | eqx.Module

    def __post_init__(self) -> None:
        shape = tuple(self.event_shape)
        whole = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in shape)
        if not 1 <= len(shape) <= 8 or not whole:
            raise ValueError(f"event_shape is {shape}; it must be a tuple of 1 to 8 positive integers such as (2,)")
        object.__setattr__(self, "event_shape", shape)
        num_outputs = self.family.num_outputs
        if callable(self.network):
            log_snr = jax.ShapeDtypeStruct((), jnp.float32)
            outputs = eqx.filter_eval_shape(self.network, self._network_input, log_snr)
            given = getattr(outputs, "shape", None)
            if given != (num_outputs,):
                raise ValueError(f"network gives outputs of shape {given}; {self.family} wants ({num_outputs},)")

    @property
    def family(self) -> Family:
        """The distributions of the chains."""
        raise NotImplementedError(f"{type(self).__name__} has no family; a subclass, as GaussianDiffusion, returns one")

    def checked(self, x: ArrayLike, name: str, minimum: int = 1, features: Sequence[str] | None = None) -> np.ndarray:
        """x as data of this diffusion, (N, *event_shape) in the support of the family; raises as `check_support`."""
        return check_support(x, self.event_shape, self.family.support, name, minimum, features)

    @property
    def num_timesteps(self) -> int:
        return self.schedule.num_timesteps

    def forward(self, x_0: Event, *, stacked: bool = False, subsample_size: int | None = None) -> None:
        """q(x_1…x_T given x_0) = ∏ q(x_t given x_{t−1}), N3 and N5: sites x_1, …, x_T.

        The guide for `Trace_ELBO`, which then is N17. `TraceMeanField_ELBO` wants `forward_posterior`.
        """
        q, T = self.family, self.num_timesteps
        noise = self.schedule()
        plate, x_0 = self._data(x_0, subsample_size)
        if stacked:
            scan_site(plate, lambda x_prev, t: compiled.step(q, x_prev, noise, t), x_0, range(1, T + 1))
            return
        with plate:
            x_t = x_0
            for t in range(1, T + 1):
                step = compiled.step(q, x_t, noise, t)
                x_t = numpyro.sample(f"x_{t}", step if T == 1 else ForwardStep(step))

    def forward_posterior(self, x_0: Event, *, stacked: bool = False, subsample_size: int | None = None) -> None:
        """The same q as q(x_T given x_0) ∏ q(x_{t−1} given x_t, x_0): sites x_T, …, x_1."""
        q, T = self.family, self.num_timesteps
        noise = self.schedule()
        plate, x_0 = self._data(x_0, subsample_size)
        marginal = compiled.marginal(q, x_0, noise, T)
        if stacked:

            def step(x_next: Event, t: Time) -> dist.Distribution:
                return where(t == T, marginal, compiled.posterior(q, x_next, x_0, noise, jnp.minimum(t + 1, T)))

            scan_site(plate, step, jnp.zeros_like(x_0), range(T, 0, -1))
            return
        with plate:
            x_t = numpyro.sample(f"x_{T}", marginal)
            for t in range(T, 1, -1):
                x_t = numpyro.sample(f"x_{t - 1}", compiled.posterior(q, x_t, x_0, noise, t))

    def reverse(
        self,
        x_0: Event | None = None,
        *,
        stacked: bool = False,
        subsample_size: int | None = None,
        dropout: bool = False,
    ) -> Event:
        """p(x_T) ∏ p(x_{t−1} given x_t), N8 and N13: sites x_T, …, x_0; returns x_0.

        x_0 is observed where it is given. Where it is not, one datum is drawn; N at once come from
        `Predictive(..., num_samples=N)` or, for the explicit form, from a plate around the program.
        """
        p, T = self.family, self.num_timesteps
        _, kernel = self.kernels(dropout)
        plate, x_0 = self._data(x_0, subsample_size)
        terminal = compiled.terminal(p, self._batch_shape(x_0))
        if stacked:

            def step(x_next: Event, t: Time) -> dist.Distribution:
                below = kernel(x_next, jnp.minimum(t + 1, T))
                return where(t == T, in_form_of(terminal, below), below)

            x_1 = scan_site(plate, step, jnp.zeros(terminal.shape(), state_dtype(p)), range(T, 0, -1))
            with plate:
                return numpyro.sample("x_0", kernel(x_1, 1), obs=x_0)
        with plate:
            x_t = numpyro.sample(f"x_{T}", terminal)
            for t in range(T, 0, -1):
                x_t = numpyro.sample(f"x_{t - 1}", kernel(x_t, t), obs=x_0 if t == 1 else None)
        return x_t

    def forward_at_time(
        self, x_0: Event, *, time_probs: Float[Array, " T"] | None = None, subsample_size: int | None = None
    ) -> None:
        """The guide of `reverse_at_time`: sites u, x_t, x_prev and x_T."""
        q, T = self.family, self.num_timesteps
        noise = self.schedule()
        plate, x_0 = self._data(x_0, subsample_size)
        t, scale = draw_times(self.num_timesteps, self._batch_shape(x_0), time_probs)
        with plate:
            with handlers.mask(mask=False):
                x_t = numpyro.sample("x_t", compiled.marginal(q, x_0, noise, t))
            if T > 1:
                with handlers.scale(scale=scale), handlers.mask(mask=t > 1):
                    numpyro.sample("x_prev", compiled.posterior(q, x_t, x_0, noise, jnp.maximum(t, 2)))
            numpyro.sample(f"x_{T}", compiled.marginal(q, x_0, noise, T))

    def reverse_at_time(
        self,
        x_0: Event,
        *,
        time_probs: Float[Array, " T"] | None = None,
        subsample_size: int | None = None,
        dropout: bool = False,
    ) -> None:
        """One t per datum, with probability π_t, its term of the ELBO scaled by 1/π_t: an unbiased estimate of N17.

        K = E_t[ (log p(x_0 given x_1) where t = 1, else −KL(q(x_{t−1} given x_t, x_0) ‖ p(x_{t−1} given x_t))) / π_t ]
        − KL(q(x_T given x_0) ‖ p(x_T)). π is `time_probs` (T,), positive and of sum 1, the same in both programs, by
        default uniform. The t of a batch are evenly spread: one uniform draw u shifts a grid.
        x_t is drawn from q(x_t given x_0) in both programs, so its density cancels and is masked out. Where draws carry
        no gradient, of bits, the factor "score", zero in value, has the gradient of K through them.
        Sites u, x_t, x_prev, x_0 and x_T, and the deterministic t.
        """
        p, T = self.family, self.num_timesteps
        noise, kernel = self.kernels(dropout)
        plate, x_0 = self._data(x_0, subsample_size)
        t, scale = draw_times(self.num_timesteps, self._batch_shape(x_0), time_probs)
        q_of_x_0, x_prev = compiled.marginal(p, x_0, noise, t), None
        with plate:
            with handlers.mask(mask=False):
                x_t = numpyro.sample("x_t", q_of_x_0)
            p_of_x_t = kernel(x_t, t)
            with handlers.scale(scale=scale):
                if T > 1:
                    with handlers.mask(mask=t > 1):
                        x_prev = numpyro.sample("x_prev", p_of_x_t)
                with handlers.mask(mask=t == 1):
                    numpyro.sample("x_0", p_of_x_t, obs=x_0)
            if not q_of_x_0.has_rsample:
                q_of_x_t = compiled.posterior(p, x_t, x_0, noise, jnp.clip(t, min(2, T), T))
                numpyro.factor("score", scale * score_term(t, x_0, x_t, x_prev, q_of_x_0, q_of_x_t, p_of_x_t))
            numpyro.sample(f"x_{T}", compiled.terminal(p, self._batch_shape(x_0)))

    def kernels(self, dropout: bool = False) -> tuple[NoiseLevels, Callable[[Event, Time], dist.Distribution]]:
        """The noise levels, and p(x_{t−1} given x_t) as a function of x_t and t: all that has params.

        Called inside a program, or under `handlers.substitute(..., data=params)`. The function takes x_t of
        any batch shape, and one t or a t per datum. With `dropout`, units of the network are left out at random, the
        same for all t of a datum: for programs that are fitted, not for densities.
        """
        noise, params = self.schedule(), self._params()
        key = numpyro.prng_key() if dropout else None
        return noise, lambda x_t, t: _kernel(self, params, noise, x_t, t, key)

    def prior(self, params: Params) -> Callable[..., Event]:
        """p(x_0), N12, with fixed params, as a NumPyro program for any model, in plates or under `scope`.

        The program returns x_0 in the chain's own units, one for each element of the plates around it. Sites x_T, …,
        x_0. Those of Gaussian kernels and of mixtures are `NonCentred`: deterministic functions of x_T and of standard
        normal sites x_3_base and so on, unless a handler such as `condition` gives them a value, so that NUTS and
        automatic guides move in all of them. With `stacked=True` the noise of x_T…x_1 is one site "x_path_base"
        (T, *event_shape), and "x_path" deterministic, by a scan, whatever T is.
        Raises `ValueError` for params of another diffusion, and where the stacked form is given a value for x_T…x_1.
        """
        wanted = jax.eval_shape(self.initial_params, jax.random.key(0))
        missing = [name for name in wanted if name not in params]
        if missing:
            raise ValueError(f"params has no {missing[0]!r}; this diffusion has {', '.join(wanted)}")
        for name, like in wanted.items():
            if jax.tree.map(jnp.shape, of_network(params)[name]) != jax.tree.map(jnp.shape, like):
                raise ValueError(f"params[{name!r}] has other shapes than this diffusion's: are they of a fit of it?")

        def draw(*, stacked: bool = False) -> Event:
            with handlers.block(), handlers.substitute(data=params):
                _, kernel = self.kernels()
            return ancestral(self.family.terminal(), kernel, self.num_timesteps, stacked=stacked)

        return draw

    def initial_params(self, rng_key: Key) -> Params:
        """The params that a fit starts from."""
        with LOCK, handlers.block():  # where it is called in a model, the params are none of that
            trace = handlers.trace(handlers.seed(self.kernels, rng_key)).get_trace()
        return {name: site["value"] for name, site in trace.items() if site["type"] == "param"}

    def _params(self) -> eqx.Module:
        return numpyro.param("network$params", lambda rng_key: self._build(rng_key)[0])

    def _network(self, params: eqx.Module, dropout_key: Key | None = None) -> Callable[[Event, Array], Array]:
        """The network over any batch shape, with units left out of each datum's own where there is a key."""
        _, static = eqx.filter_eval_shape(self._build, jax.random.key(0))
        network: Any = eqx.combine(params, static)
        axes = len(self._network_input.shape)
        event = f"({','.join('abcdefgh'[:axes])})"
        if dropout_key is None or not _has_dropout(network):
            return jnp.vectorize(network, signature=f"{event},()->(p)")
        one = jnp.vectorize(lambda x, log_snr, key: network(x, log_snr, key=key), signature=f"{event},(),()->(p)")
        return lambda x, log_snr: one(x, log_snr, jax.random.split(dropout_key, x.shape[: x.ndim - axes]))

    @property
    def _network_input(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of what the network is given of one x_t."""
        x_t = jax.ShapeDtypeStruct(self.event_shape, state_dtype(self.family))
        return jax.eval_shape(self.family.network_input, x_t)

    def _build(self, rng_key: Key) -> tuple[eqx.Module, eqx.Module]:
        recipe = self.network
        module = (
            recipe
            if isinstance(recipe, eqx.Module)
            else recipe.build(rng_key, self._network_input.shape, self.family.num_outputs)
        )
        return eqx.partition(module, eqx.is_inexact_array)

    def _batch_shape(self, x_0: Event | None) -> tuple[int, ...]:
        return () if x_0 is None else x_0.shape[: x_0.ndim - len(self.event_shape)]

    def _data(self, x_0: Any, subsample_size: int | None) -> tuple[AbstractContextManager, Any]:
        """The plate "data", to be entered as often as needed, and the rows of x_0 that it draws."""
        if x_0 is None:
            return nullcontext(), None
        shape = jnp.shape(x_0)
        if shape != self.event_shape and shape[1:] != self.event_shape:
            raise ValueError(f"x_0 has shape {shape}; this diffusion has event_shape {self.event_shape}")
        x_0 = as_state(self.family, x_0)
        if shape == self.event_shape:
            return nullcontext(), x_0
        if subsample_size is not None and not 1 <= subsample_size <= shape[0]:
            raise ValueError(f"subsample_size is {subsample_size}; x_0 has {shape[0]} rows")
        plate = numpyro.plate("data", shape[0], subsample_size=subsample_size)
        with plate as index:
            return plate, x_0 if subsample_size is None else x_0[index]


@dataclass(frozen=True, eq=False)
class GaussianDiffusion(Diffusion):
    """A Gaussian diffusion: q(x_t given x_{t−1}) = N(√(1−β_t)·x_{t−1}, β_t·I), N3; the programs are `Diffusion`'s.

    `covariance` of the reverse kernel: "fixed", "diagonal" or "full" (a Cholesky factor). With several `components` it
    is a mixture of so many Gaussians, of whose terms in N17 those at t ≥ 2 have no closed form: `Trace_ELBO` takes the
    draw of the site, and `TraceMeanField_ELBO`, the form at one time and `fit` take `families.mixtures.kl_to_mixture`.
    Data are floating-point.
    """

    covariance: Covariance = "diagonal"
    components: int = 1

    @property
    def family(self) -> Gaussian:
        return Gaussian(self.event_shape, self.covariance, self.components)

    def kernels(self, dropout: bool = False) -> tuple[NoiseLevels, Callable[[Event, Time], dist.Distribution]]:
        """As those of any diffusion; a mixture has a key for its KL divergence where the program is seeded."""
        noise, kernel = super().kernels(dropout)
        key = numpyro.prng_key() if self.components > 1 else None
        if key is None:
            return noise, kernel
        return noise, lambda x_t, t: kernel(x_t, t).with_key(key if jnp.ndim(t) else jax.random.fold_in(key, t))

    def _network(self, params: eqx.Module, dropout_key: Key | None = None) -> Callable[[Event, Array], Array]:
        if isinstance(params, GaussianStart):
            return params.around(self._network(params.network, dropout_key), self.components)
        network = super()._network(params, dropout_key)
        if self.components == 1:
            return network
        offsets = jnp.asarray(self.family.offsets, jnp.result_type(float))
        return lambda x_t, log_snr: network(x_t, log_snr) + offsets

    def predictions(self) -> tuple[NoiseLevels, Callable[[Event, Time], tuple[dist.Distribution, Any]]]:
        """As `kernels`; the function gives p(x_{t−1} given x_t), and what the network says of x_0: `Gaussian.clean`."""
        noise, params = self.schedule(), self._params()

        def predict(x_t: Event, t: Time) -> tuple[dist.Distribution, Any]:
            outputs = _outputs(self, params, noise, x_t, t)
            return self.family.kernel(x_t, outputs, noise, t), self.family.clean(x_t, outputs, noise, t)

        return noise, predict

    def denoiser(self) -> Callable[[Event, Array], Event]:
        """x̂_0(x, λ), the network's prediction of x_0 from x_t = x, at any log-SNR λ; called as `kernels` is."""
        network = self._network(self._params())

        def predict(x: Event, log_snr: Array) -> Event:
            shrink, std = jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))
            return self.family.predicted(x, network(x, log_snr), shrink, std)

        return predict


@dataclass(frozen=True, eq=False)
class BinomialDiffusion(Diffusion):
    """A binomial diffusion: q(x_t given x_{t−1}) = Bernoulli(x_{t−1}·(1−β_t) + π·β_t) of each bit; p(x_T) is of rate π.

    The programs are `Diffusion`'s. π is `base_rate`. p(x_{t−1} given x_t) is a product over bits, or with `components`
    a mixture of so many products. Data are bits, 0 or 1, of any dtype.
    Source: Sohl-Dickstein et al. 2015, appendix B.2.
    """

    base_rate: float = 0.5
    components: int = 1

    @property
    def family(self) -> Binomial:
        return Binomial(self.event_shape, self.base_rate, self.components)


# compiled on its own, so that a program that runs without `jit` compiles one kernel and not T of them
@partial(jax.jit, static_argnums=0)
def _kernel(
    d: Diffusion, params: eqx.Module, noise: NoiseLevels, x_t: Event, t: Time, dropout_key: Key | None = None
) -> dist.Distribution:
    """p(x_{t−1} given x_t), N8."""
    return d.family.kernel(x_t, _outputs(d, params, noise, x_t, t, dropout_key), noise, t)


def _outputs(
    d: Diffusion, params: eqx.Module, noise: NoiseLevels, x_t: Event, t: Time, dropout_key: Key | None = None
) -> Float[Array, "*batch P"]:
    """What the network says at x_t."""
    # −∞ where β_T = 1, which no network should have to expect
    log_snr = jnp.clip(noise.log_snr[jnp.asarray(t) - 1], -30.0, 30.0)
    return d._network(params, dropout_key)(d.family.network_input(x_t), log_snr)


def _is_dropout(node: Any) -> bool:
    return isinstance(node, eqx.nn.Dropout)


def _has_dropout(network: Any) -> bool:
    return any(_is_dropout(node) and node.p > 0 for node in jax.tree.leaves(network, is_leaf=_is_dropout))
