"""`fit(...)`, and `Fit`, what it returns: a fitted diffusion in the data's own units."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Float
from numpy.typing import ArrayLike
from numpyro import handlers

from probdiff import diagnostics, likelihood, training
from probdiff.chains import GaussianDiffusion
from probdiff.datasets import check_data, check_varies, some, split
from probdiff.files import atomic_write
from probdiff.likelihood import ELBOParts, LogLikelihood
from probdiff.schedules import NoiseLevels
from probdiff.types import Key, Params

_ROWS_PER_FEATURE = 100  # fewer are few
_HELD_OUT = 0.15


def fit(
    d: GaussianDiffusion,
    x: ArrayLike,
    *,
    rng_key: Key,
    num_steps: int = 20_000,
    batch_size: int | None = None,
    num_chains: int = 1,
    objective: training.Objective = "at_time",
    learning_rate: float = 2e-3,
    gradient_clip: float = 1.0,
    check_every: int | None = None,
    validation: ArrayLike | float | None = None,
    patience: int | None = None,
    dropout: bool | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    progress_bar: bool = True,
) -> "Fit":
    """Fits β_t and the reverse kernels to data by SVI, maximising the ELBO of N17.

    x (N, *event_shape), floating-point, in the data's own units: the chain runs on x less its mean and over its
    standard deviation, each feature apart. `batch_size` is 512, or N where that is less. `num_chains` independent
    fits run side by side. `validation` is data (M, *event_shape) on which the best params are chosen, or the share of x
    to hold out for that, 0 for none.

    A network overfits few data. So where N is less than 100 times the number of features, the defaults are to draw the
    network's `dropout`, to hold out a share of 0.15 and to stop after a `patience` of 20 checks without progress on it;
    elsewhere none of the three. `check_every` is 100 steps with validation data and 500 without. See
    `training.Settings` for the rest and `training.train` for checkpoints.
    Raises `ValueError` or `TypeError` for data or options that do not fit, saying which and what is wanted.
    """
    data = check_data(x, d.event_shape, "x", minimum=2)
    check_varies(data, "x")
    if batch_size is not None and batch_size > len(data):
        raise ValueError(f"batch_size is {batch_size}; x has {len(data)} rows")
    few = len(data) < _ROWS_PER_FEATURE * math.prod(d.event_shape)
    rng_key = check_key(rng_key)
    if validation is None and few and round(_HELD_OUT * len(data)) >= 2:
        validation, patience = _HELD_OUT, 20 if patience is None else patience
    loc, scale = data.mean(0), data.std(0)
    data, held_out = _hold_out(data, validation, rng_key)
    if patience is not None and held_out is None:
        raise ValueError("patience wants validation data to watch; pass validation=")
    standardise = lambda rows: ((rows - loc) / scale).astype(jnp.result_type(float))  # noqa: E731
    settings = training.Settings(
        num_steps,
        min(512 if batch_size is None else batch_size, len(data)),
        num_chains,
        objective,
        learning_rate,
        gradient_clip,
        check_every if check_every is not None else 500 if held_out is None else 100,
        patience,
        few if dropout is None else dropout,
    )
    trained = training.train(
        d,
        standardise(data),
        settings,
        rng_key=rng_key,
        validation=None if held_out is None else standardise(held_out),
        checkpoint_dir=checkpoint_dir,
        resume=resume,
        progress_bar=progress_bar,
    )
    log_det = float(np.log(scale).sum())
    return Fit(d, trained.params, trained.losses + log_det, trained.validation - log_det, loc, scale)


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted diffusion. Where it has several chains, every result has them as a leading axis of size C.

    What goes in and comes out is in the data's own units: x = loc + scale·x_0, with the log-determinant −Σ log scale
    in every log density. `stacked_params` has the leading axis even for one chain.
    """

    diffusion: GaussianDiffusion
    stacked_params: Params
    stacked_losses: Float[np.ndarray, "C steps"]
    stacked_validation: Float[np.ndarray, "C checks"]
    loc: np.ndarray
    scale: np.ndarray

    @property
    def num_chains(self) -> int:
        return self.stacked_losses.shape[0]

    @property
    def params(self) -> Params:
        """The constrained NumPyro params: "beta" (T,) where β_t is free, "network$params", and a schedule's own."""
        return jax.tree.map(self._squeeze, self.stacked_params)

    @property
    def losses(self) -> np.ndarray:
        """Negative ELBO per datum of the batch at each step, nats, (steps,)."""
        return self._squeeze(self.stacked_losses)

    @property
    def validation(self) -> np.ndarray:
        """ELBO per datum of the validation data at each check, nats, (checks,)."""
        return self._squeeze(self.stacked_validation)

    @property
    def beta(self) -> np.ndarray:
        """β_t, (T,)."""
        return self._squeeze(np.asarray(self.noise_levels.beta))

    @property
    def log_snr(self) -> np.ndarray:
        """log ᾱ_t − log(1 − ᾱ_t), (T,)."""
        return self._squeeze(np.asarray(self.noise_levels.log_snr))

    @cached_property
    def noise_levels(self) -> NoiseLevels:
        """The noise levels of every chain, each leaf with the leading axis."""
        levels = [handlers.substitute(self.diffusion.schedule, data=self._of(c))() for c in range(self.num_chains)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *levels)

    @property
    def best(self) -> int:
        """The chain with the least mean loss over the last tenth of the steps."""
        last = max(1, self.stacked_losses.shape[1] // 10)
        return int(self.stacked_losses[:, -last:].mean(1).argmin())

    def chain(self, c: int) -> "Fit":
        """The fit of one chain of several."""
        if not 0 <= c < self.num_chains:
            raise ValueError(f"c is {c}; this fit has chains 0 to {self.num_chains - 1}")
        part = slice(c, c + 1)
        return replace(
            self,
            stacked_params=jax.tree.map(lambda leaf: leaf[part], self.stacked_params),
            stacked_losses=self.stacked_losses[part],
            stacked_validation=self.stacked_validation[part],
        )

    def sample(self, rng_key: Key, n: int) -> np.ndarray:
        """n draws of x_0 by ancestral sampling from p, N7; (n, *event_shape), in the data's own units."""
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
            raise ValueError(f"n is {n!r}; it must be an integer of at least 1")
        keys = jax.random.split(check_key(rng_key), self.num_chains)
        draws = [
            diagnostics.reverse_draws(self.diffusion, self._of(c), keys[c], n, times=[0])[:, 0]
            for c in range(self.num_chains)
        ]
        return self._squeeze(self.loc + self.scale * np.stack(draws))

    def elbo_parts(self, x: ArrayLike, *, rng_key: Key, num_draws: int = 8) -> ELBOParts:
        """The parts of the ELBO per datum, nats, in the data's own units; see `likelihood.ELBOParts`.

        The log-determinant is in the reconstruction. Raises as `log_likelihood`.
        """
        return self._elbo(x, rng_key, num_draws)[0]

    def log_likelihood(self, x: ArrayLike, *, rng_key: Key, method: str = "elbo", num_draws: int = 8) -> LogLikelihood:
        """Log-likelihood per datum of x (N, *event_shape), nats, in the data's own units.

        `method` "elbo": the lower bound K of N17, with closed-form KLs and `num_draws` draws of x_t for each t.
        Raises `ValueError` or `TypeError` for an x of another shape, of integers, or with entries that are not finite.
        """
        if method != "elbo":
            raise ValueError(f'method is {method!r}; there is "elbo"')
        parts, mcse = self._elbo(x, rng_key, num_draws)
        return LogLikelihood(parts.elbo, mcse, "lower bound")

    def to_datatree(
        self, x: ArrayLike, *, rng_key: Key, num_draws: int = 500, features: Sequence[str] | None = None
    ) -> xr.DataTree:
        """The fit and what it says of x (N, *event_shape) as a `DataTree` for ArviZ; see `diagnostics.to_datatree`."""
        return diagnostics.to_datatree(self, x, rng_key=check_key(rng_key), num_draws=num_draws, features=features)

    def save(self, path: str | Path) -> None:
        """Writes the fit to one .npz file, whole or not at all; `Fit.load` reads it. Raises `OSError`."""
        leaves = {f"leaf_{i:04}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(self.stacked_params))}
        names = np.array(
            [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(self.stacked_params)]
        )
        with atomic_write(path) as file, file.open("wb") as stream:
            np.savez(
                stream,
                names=names,
                losses=self.stacked_losses,
                validation=self.stacked_validation,
                loc=self.loc,
                scale=self.scale,
                event_shape=self.diffusion.event_shape,
                covariance=self.diffusion.covariance,
                beta=np.asarray(self.noise_levels.beta),
                **leaves,  # type: ignore[arg-type]  # no leaf is called allow_pickle
            )

    @classmethod
    def load(cls, path: str | Path, d: GaussianDiffusion) -> Self:
        """Reads what `save` wrote for the diffusion `d`. Raises `ValueError` where it does not fit or is damaged."""
        try:
            with Path(path).open("rb") as stream, np.load(stream, allow_pickle=False) as held:
                arrays = dict(held)
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist") from None
        except Exception as error:  # a damaged archive fails in many ways
            raise ValueError(f"{path} could not be read as a fit: {error}") from error
        if not {"names", "beta", "event_shape", "covariance", "losses", "validation", "loc", "scale"} <= set(arrays):
            raise ValueError(f"{path} could not be read as a fit: it holds other arrays")
        for name, mine in (("event_shape", list(d.event_shape)), ("covariance", d.covariance)):
            if arrays[name].tolist() != mine:
                raise ValueError(
                    f"{path} holds the fit of another diffusion: its {name} is {arrays[name].tolist()}, not {mine}"
                )
        template = jax.eval_shape(partial(_initial_params, d), jax.random.key(0))
        wanted, treedef = jax.tree_util.tree_flatten_with_path(template)
        names = [jax.tree_util.keystr(path) for path, _ in wanted]
        if names != arrays["names"].tolist():
            raise ValueError(f"{path} holds the fit of another diffusion: its params are {some(arrays['names'])}")
        leaves = [arrays[f"leaf_{i:04}"] for i in range(len(names))]
        for name, leaf, (_, like) in zip(names, leaves, wanted, strict=True):
            if leaf.shape[1:] != like.shape:
                raise ValueError(
                    f"{path} holds the fit of another diffusion: {name} is {leaf.shape[1:]}, not {like.shape}"
                )
        params = jax.tree.unflatten(treedef, [jnp.asarray(leaf) for leaf in leaves])
        fit = cls(d, params, arrays["losses"], arrays["validation"], arrays["loc"], arrays["scale"])
        beta = np.asarray(fit.noise_levels.beta)
        if beta.shape != arrays["beta"].shape or not np.allclose(beta, arrays["beta"], rtol=1e-5, atol=0):
            raise ValueError(f"{path} holds the fit of another diffusion: its β_t are not those of this schedule")
        return fit

    def _of(self, c: int) -> Params:
        return training.chain(self.stacked_params, c)

    def _squeeze(self, leaf: Any) -> Any:
        return leaf[0] if self.num_chains == 1 else leaf

    def standardise(self, x: ArrayLike, name: str = "x") -> np.ndarray:
        """x in the chain's own units, checked."""
        data = check_data(x, self.diffusion.event_shape, name)
        return ((data - self.loc) / self.scale).astype(jnp.result_type(float))

    def _elbo(self, x: ArrayLike, rng_key: Key, num_draws: int) -> tuple[ELBOParts, np.ndarray]:
        x_0 = self.standardise(x)
        if isinstance(num_draws, bool) or not isinstance(num_draws, int | np.integer) or num_draws < 2:
            raise ValueError(
                f"num_draws is {num_draws!r}; it must be an integer of at least 2, to give a standard error"
            )
        keys = jax.random.split(check_key(rng_key), self.num_chains)
        chains = [
            likelihood.elbo_parts(self.diffusion, self._of(c), x_0, rng_key=keys[c], num_draws=num_draws)
            for c in range(self.num_chains)
        ]
        stack = lambda arrays: self._squeeze(np.stack(list(arrays)))  # noqa: E731
        parts = ELBOParts(
            stack(parts.prior for parts, _ in chains),
            stack(parts.steps for parts, _ in chains),
            stack(parts.reconstruction for parts, _ in chains) - np.log(self.scale).sum(),
        )
        return parts, stack(mcse for _, mcse in chains)


def _hold_out(
    data: np.ndarray, validation: ArrayLike | float | None, rng_key: Key
) -> tuple[np.ndarray, np.ndarray | None]:
    """The rows to fit and those held out, if any: `validation` itself, or a share of the data drawn at random."""
    if validation is None:
        return data, None
    if np.ndim(validation):
        return data, check_data(validation, data.shape[1:], "validation")
    share = float(np.asarray(validation))
    if not 0 <= share < 1:
        raise ValueError(f"validation is {share}; it must be data, or a share of x from 0 to less than 1")
    if share == 0:
        return data, None
    parts = split(data, (), jax.random.fold_in(rng_key, 1), share)
    return parts.train, parts.test


def _initial_params(d: GaussianDiffusion, rng_key: Key) -> Params:
    trace = handlers.trace(handlers.seed(d.components, rng_key)).get_trace()
    return {name: site["value"] for name, site in trace.items() if site["type"] == "param"}


def check_key(rng_key: Key) -> Key:
    """A typed key of `rng_key`, which may be an old-style one. Raises `TypeError` where it is no key."""
    dtype = getattr(rng_key, "dtype", None)
    if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) and rng_key.shape == ():
        return rng_key
    if dtype == jnp.uint32 and rng_key.shape == (2,):
        return jax.random.wrap_key_data(rng_key)
    raise TypeError(f"rng_key is {rng_key!r}; it must be one key, such as jax.random.key(0)")
