"""`Fit`: a fitted diffusion in the data's own units."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Float
from numpy.typing import ArrayLike

from probdiff.chains import Diffusion
from probdiff.checks import check_count, check_key, some
from probdiff.diagnostics import to_datatree
from probdiff.families.base import family_options
from probdiff.files import atomic_write
from probdiff.likelihood.elbo import PARTS, ELBOParts, elbo, elbo_draws
from probdiff.likelihood.exact import exact
from probdiff.likelihood.flow import ode
from probdiff.likelihood.paths import iwae, upper
from probdiff.likelihood.result import LogLikelihood
from probdiff.likelihood.smc import smc
from probdiff.networks.gaussian_start import with_start
from probdiff.sampling import in_precision, noise_levels, one_fit, reverse_draws
from probdiff.schedules import NoiseLevels
from probdiff.types import Event, Key, Params
from probdiff.units import Units, to_chain, warn_of_precision

Method = Literal["elbo", "iwae", "smc", "upper", "ode", "exact"]


@dataclass(frozen=True, eq=False, repr=False)
class Fit:
    """A fitted diffusion. Where it holds several independent fits, every result has them as a leading axis of size C.

    What goes in and comes out is in the data's own units: x = loc + scale·(A·x_0), with A the matrix `axes`, or the
    identity where that is None, and with the log-determinant −Σ log scale − log |det A| in every log density.
    `stacked_params` has the leading axis even for one fit. `features` are the names of the columns of the data frame
    that was fitted: those of a frame that is given later are taken by name, whatever their order, and those of an array
    by position. `whole` says which features, flattened, are integers that were dequantised: draws of them are rounded
    down.
    """

    diffusion: Diffusion
    stacked_params: Params
    stacked_losses: Float[np.ndarray, "C steps"]
    stacked_validation: Float[np.ndarray, "C checks"]
    loc: np.ndarray
    scale: np.ndarray
    features: tuple[str, ...] | None = None
    whole: tuple[bool, ...] | None = None
    axes: np.ndarray | None = None
    steps: np.ndarray | None = None

    def __repr__(self) -> str:
        d, steps = self.diffusion, self.stacked_losses.shape[1]
        names = f" ({some(self.features)})" if self.features else ""
        options = "".join(f", {name} {value}" for name, value in family_options(d.family).items())
        last = self.stacked_losses[:, -max(1, steps // 10) :].mean(1)
        how = f"loss of the last tenth of its steps, nats per datum: {_numbers(last)}"
        if self.stacked_validation.size:
            best = ", ".join(f"{step:,}" for step in self.steps_kept)
            how = f"best of validation, nats per datum: {_numbers(self.stacked_validation.max(1))}, after {best} steps"
            how += " (0: the Gaussian that it starts from)" * (0 in self.steps_kept)
        beta, on_axes = np.asarray(self.noise_levels.beta), "x_0" if self.axes is None else "(A·x_0)"
        return "\n".join(
            [
                f"Fit of a {type(d).__name__}: {self.loc.size} feature(s){names}, T = {d.num_timesteps}{options}",
                f"{self.num_chains} chain(s) of {steps:,} steps",
                how,
                f"β_t from {beta[:, 0].min():.3g} to {beta.max():.3g}, of {type(d.schedule).__name__}",
                f"data = loc + scale·{on_axes}: loc {_numbers(self.loc.ravel())}; scale {_numbers(self.scale.ravel())}",
            ]
        )

    @property
    def units(self) -> Units:
        """The chain's own units in those of the data."""
        return Units(self.loc, self.scale, self.axes)

    @property
    def num_chains(self) -> int:
        return self.stacked_losses.shape[0]

    @property
    def params(self) -> Params:
        """The constrained NumPyro params: "beta" (T,) where β_t is free, "network$params", and a schedule's own."""
        return jax.tree.map(self._squeeze, in_precision(self.stacked_params))

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
        """The noise levels of every fit, each leaf with the leading axis."""
        return noise_levels(self.diffusion, self.stacked_params, self.num_chains)

    @property
    def steps_kept(self) -> list[int]:
        """After how many steps the params of each fit were those that are kept: its best check, or without one all.

        Zero where the network was no better than the Gaussian that it starts from.
        """
        if self.steps is not None:
            return self.steps.tolist()
        steps, checks = self.stacked_losses.shape[1], self.stacked_validation.shape[1]
        if not checks:
            return [steps] * self.num_chains
        every = -(-steps // checks)
        return [min(steps, (int(i) + 1) * every) for i in np.nanargmax(self.stacked_validation, axis=1)]

    @property
    def best(self) -> int:
        """The fit with the largest validation ELBO, or without one the least mean loss of the last tenth of steps."""
        if self.stacked_validation.size:
            return int(np.nanmax(self.stacked_validation, axis=1).argmax())
        last = max(1, self.stacked_losses.shape[1] // 10)
        return int(self.stacked_losses[:, -last:].mean(1).argmin())

    def chain(self, c: int) -> "Fit":
        """One of several independent fits. Raises `ValueError` where there is no fit c."""
        if not isinstance(c, int | np.integer) or not 0 <= c < self.num_chains:
            raise ValueError(f"c is {c!r}; this fit has chains 0 to {self.num_chains - 1}")
        part = slice(c, c + 1)
        return replace(
            self,
            stacked_params=jax.tree.map(lambda leaf: leaf[part], self.stacked_params),
            stacked_losses=self.stacked_losses[part],
            stacked_validation=self.stacked_validation[part],
            steps=None if self.steps is None else self.steps[part],
        )

    def sample(self, rng_key: Key, n: int, *, paths: bool = False) -> np.ndarray:
        """n draws of x_0 by ancestral sampling from p, N7; (n, *event_shape), in the data's own units.

        Features that are `whole` are integers. With `paths`, all of x_0…x_T of each draw, N13, which are not rounded:
        (n, T+1, *event_shape).
        """
        check_count(n, "n", 1)
        times = range(self.diffusion.num_timesteps + 1) if paths else [0]
        keys = jax.random.split(check_key(rng_key), self.num_chains)
        draws = np.stack(
            [reverse_draws(self.diffusion, self._params_of(c), keys[c], n, times) for c in range(self.num_chains)]
        )
        draws = draws if paths else draws[:, :, 0]
        if self.diffusion.family.support.is_discrete:  # bits have no units
            return self._squeeze(draws)
        draws = self.units.to_data(draws)
        return self._squeeze(draws if paths else self.rounded(draws))

    def prior(self) -> Callable[..., Event]:
        """p(x_0) as a NumPyro program that returns x in the data's own units, its sites in the chain's.

        See `Diffusion.prior`. Warns of features too far from zero for single precision. Raises `ValueError` where there
        are several chains.
        """
        if self.num_chains > 1:
            raise ValueError(f"this fit has {self.num_chains} chains; choose one, such as fit.chain(fit.best).prior()")
        program = self.diffusion.prior(self.params)
        if self.diffusion.family.support.is_discrete:  # bits have no units
            return program
        warn_of_precision(self.loc, self.scale, self.features)
        return lambda *, stacked=False: self.units.to_data(program(stacked=stacked))

    def elbo_parts(self, x: ArrayLike, *, rng_key: Key, num_draws: int = 8) -> ELBOParts:
        """The parts of the ELBO per datum, nats, in the data's own units; see `ELBOParts`.

        The log-determinant is in the reconstruction. Raises as `log_likelihood`.
        """
        check_count(num_draws, "num_draws", 2)
        x_0, keys = self.standardise(x), jax.random.split(check_key(rng_key), self.num_chains)
        fits = [
            elbo_draws(self.diffusion, self._params_of(c), x_0, rng_key=keys[c], num_draws=num_draws)[0]
            for c in range(self.num_chains)
        ]
        terminal, steps, first = (self._squeeze(np.stack([getattr(one, name) for one in fits])) for name in PARTS)
        return ELBOParts(terminal, steps, first - self.units.log_det)

    def log_likelihood(
        self,
        x: ArrayLike,
        *,
        rng_key: Key | None = None,
        method: Method = "elbo",
        num_draws: int = 8,
        num_particles: int = 100,
    ) -> LogLikelihood:
        """Log-likelihood per datum of x (N, *event_shape), nats, in the data's own units.

        | `method` | kind | what |
        |---|---|---|
        | "elbo" | lower bound | K of N17: closed-form KLs, `num_draws` draws of x_t for each t |
        | "iwae" | lower bound | `num_particles` whole paths from q; k̂ of their weights; `iwae` |
        | "smc" | estimate | `num_draws` twisted filters of `num_particles`; `smc` |
        | "upper" | upper bound | x are paths (N, T+1, *event_shape) of `sample(..., paths=True)`; `upper` |
        | "ode" | estimate | of a Gaussian chain's flow; a lower bound of it beyond 16 features; `ode` |
        | "exact" | exact | linear-Gaussian chains, one dimension, up to 12 bits; needs no rng_key; `exact` |

        Raises `ValueError` or `TypeError` for an x of another shape, of integers, or with entries that are not finite,
        for counts below 2 (3 particles for "upper"), and for a chain that "exact" cannot do.
        """
        if method not in get_args(Method):
            raise ValueError(f"method is {method!r}; it must be one of {', '.join(get_args(Method))}")
        check_count(num_draws, "num_draws", 2)
        check_count(num_particles, "num_particles", 3 if method == "upper" else 2)
        C, d = self.num_chains, self.diffusion
        x_0 = self._standardise_paths(x) if method == "upper" else np.stack([self.standardise(x)] * C)
        if method == "exact":
            results = [exact(d, self._params_of(c), x_0[c]) for c in range(C)]
        else:
            run = {
                "elbo": partial(elbo, num_draws=num_draws),
                "iwae": partial(iwae, num_particles=num_particles),
                "smc": partial(smc, num_particles=num_particles, num_draws=num_draws),
                "upper": partial(upper, num_particles=num_particles),
                "ode": partial(ode, num_draws=num_draws),
            }[method]
            keys = jax.random.split(check_key(rng_key), C)
            results = [run(d, self._params_of(c), x_0[c], rng_key=keys[c]) for c in range(C)]
        values, mcse = (
            self._squeeze(np.stack([getattr(r, name) for r in results])) for name in ("values", "values_mcse")
        )
        k = [r.pareto_k for r in results if r.pareto_k is not None]
        return LogLikelihood(
            values - self.units.log_det, mcse, results[0].kind, self._squeeze(np.stack(k)) if k else None
        )

    def to_datatree(
        self, x: ArrayLike, *, rng_key: Key, num_draws: int = 500, features: Sequence[str] | None = None
    ) -> xr.DataTree:
        """The fit and what it says of x (N, *event_shape) as a `DataTree` for ArviZ; see `diagnostics.to_datatree`."""
        dt = to_datatree(
            self.diffusion,
            self.stacked_params,
            self.checked(x),
            losses=self.stacked_losses,
            units=self.units,
            rng_key=check_key(rng_key),
            num_draws=num_draws,
            features=self.features if features is None else features,
        )
        for group in ("posterior_predictive", "observed_data"):
            values = dt[group].dataset["x_0"]
            dt[group] = dt[group].dataset.assign(x_0=values.copy(data=self.rounded(values.to_numpy(), flat=True)))
        return dt

    def save(self, path: str | Path) -> None:
        """Writes the fit to one .npz file, whole or not at all; `Fit.load` reads it. Raises `OSError`."""
        leaves = {f"leaf_{i:04}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(self.stacked_params))}
        named = (("features", self.features), ("whole", self.whole), ("axes", self.axes), ("steps", self.steps))
        optional = {name: np.array(held) for name, held in named if held is not None}
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
                **family_options(self.diffusion.family),
                beta=np.asarray(self.noise_levels.beta),
                **leaves,  # type: ignore[arg-type]  # no leaf is called allow_pickle
                **optional,  # type: ignore[arg-type]
            )

    @classmethod
    def load(cls, path: str | Path, d: Diffusion) -> Self:
        """Reads what `save` wrote for the diffusion `d`. Raises `ValueError` where it does not fit or is damaged."""
        try:
            with Path(path).open("rb") as stream, np.load(stream, allow_pickle=False) as held:
                arrays = dict(held)
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist") from None
        except ValueError:
            raise ValueError(f"{path} could not be read as a fit: it is no .npz file, or a damaged one") from None
        except Exception as error:  # a damaged archive fails in many ways
            raise ValueError(f"{path} could not be read as a fit: {error}") from error
        options = family_options(d.family)
        if not {"names", "beta", "event_shape", *options, "losses", "validation", "loc", "scale"} <= set(arrays):
            raise ValueError(f"{path} could not be read as a fit: it holds other arrays")
        for name, mine in (("event_shape", list(d.event_shape)), *options.items()):
            if arrays[name].tolist() != mine:
                raise ValueError(
                    f"{path} holds the fit of another diffusion: its {name} is {arrays[name].tolist()}, not {mine}"
                )
        bare = jax.eval_shape(d.initial_params, jax.random.key(0))
        # fits of Gaussian chains have a start around the network's params, but for those of earlier versions
        for template in (bare, with_start(bare, *[jnp.zeros(d.event_shape)] * 3)):
            wanted, treedef = jax.tree_util.tree_flatten_with_path(template)
            names = [jax.tree_util.keystr(path) for path, _ in wanted]
            if names == arrays["names"].tolist():
                break
        if names != arrays["names"].tolist():
            raise ValueError(f"{path} holds the fit of another diffusion: its params are {some(arrays['names'])}")
        leaves = [arrays[f"leaf_{i:04}"] for i in range(len(names))]
        for name, leaf, (_, like) in zip(names, leaves, wanted, strict=True):
            if leaf.shape[1:] != like.shape:
                raise ValueError(
                    f"{path} holds the fit of another diffusion: {name} is {leaf.shape[1:]}, not {like.shape}"
                )
        params = jax.tree.unflatten(treedef, [jnp.asarray(leaf) for leaf in leaves])
        features, whole = (tuple(arrays[name].tolist()) if name in arrays else None for name in ("features", "whole"))
        units = Units(arrays["loc"], arrays["scale"], arrays.get("axes", arrays.get("rotation")))
        of_fit = arrays["losses"], arrays["validation"], units.loc, units.scale, features, whole, units.axes
        fit = cls(d, params, *of_fit, arrays.get("steps"))
        beta = np.asarray(fit.noise_levels.beta)
        if beta.shape != arrays["beta"].shape or not np.allclose(beta, arrays["beta"], rtol=1e-5, atol=1e-9):
            raise ValueError(f"{path} holds the fit of another diffusion: its β_t are not those of this schedule")
        return fit

    def _params_of(self, c: int) -> Params:
        return one_fit(self.stacked_params, c)

    def _squeeze(self, leaf: Any) -> Any:
        return leaf[0] if self.num_chains == 1 else leaf

    def checked(self, x: ArrayLike, name: str = "x") -> np.ndarray:
        """x as data of the diffusion, in the data's own units, the columns of a data frame by name."""
        return self.diffusion.checked(x, name, features=self.features)

    def rounded(self, x: np.ndarray, flat: bool = False) -> np.ndarray:
        """x (…, *event_shape), or `flat` (…, D), in the data's units, with features that are `whole` rounded down."""
        if not any(self.whole or ()):
            return x
        whole = np.array(self.whole)
        return np.where(whole if flat else whole.reshape(self.loc.shape), np.floor(x), x)

    def standardise(self, x: ArrayLike, name: str = "x") -> np.ndarray:
        """x in the chain's own units, checked."""
        return to_chain(self.diffusion, self.checked(x, name), self.units, name)

    def _standardise_paths(self, x: ArrayLike) -> np.ndarray:
        """x_0…x_T in the chain's own units, (C, N, T+1, *event_shape), checked."""
        array, C = np.asarray(x), self.num_chains
        shape = (self.diffusion.num_timesteps + 1, *self.diffusion.event_shape)
        array = array if C > 1 else array[None]
        if array.shape[:1] + array.shape[2:] != (C, *shape):
            wanted = ", ".join([*[str(C)] * (C > 1), "N", *map(str, shape)])
            raise ValueError(
                f'x has shape {np.shape(x)}; method "upper" wants whole paths x_0…x_T drawn from the fit, ({wanted}), '
                "as sample(rng_key, N, paths=True) gives them"
            )
        check = self.diffusion.checked
        paths = [np.stack([check(one[:, t], f"x at t = {t}") for t in range(shape[0])], axis=1) for one in array]
        return np.stack([to_chain(self.diffusion, one, self.units) for one in paths])


def _numbers(values: np.ndarray) -> str:
    return some([f"{value:.4g}" for value in values])
