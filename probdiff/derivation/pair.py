"""A pair of NumPyro programs, read as the chains q and p over x_0…x_T."""

import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.infer import Trace_ELBO
from numpyro.infer.util import log_density

from probdiff.derivation.sites import compiled, compiled_sites, log_prob
from probdiff.types import Event, Key, Params

type Program = Callable[..., Any]
type Path = dict[int, Any]  # x_t by t, (N, *event) or (S, N, *event)
type Sites = dict[str, dict[str, Any]]

_BLOCK = 2**15  # rows of data to one vectorised call


class Chain:
    """One of the two programs: q, called with x_0, or p, called with x_0 which it observes.

    `problems` says why its sites are not x_0…x_T; nothing else may be asked of a chain that has some.
    """

    def __init__(self, name: str, program: Program) -> None:
        self.name, self.program = name, program
        self.params: Params = {}
        self.problems: list[str] = []
        self.times: list[int] = []  # of the sites, in the order of the program

    def trace(self, x_0: Event, values: Mapping[str, Any], rng_key: Key) -> Sites:
        """The sites of one run, with `values` put in place of params and draws."""
        seeded = handlers.substitute(handlers.seed(self.program, rng_key), data={**self.params, **values})
        return handlers.trace(seeded).get_trace(x_0)

    def described(self, x_0: Event) -> Sites:
        """The sites of one run, whose numbers are not computed; those of params are, where they are not known."""
        sites: Sites = {}
        jax.eval_shape(lambda x: sites.update(self.trace(x, {}, jax.random.key(0))), x_0)
        if any(site["type"] == "param" and name not in self.params for name, site in sites.items()):
            sites = self.trace(x_0, {}, jax.random.key(0))
        return sites

    def kernels(self, path: Path, params: Params | None = None) -> dict[int, dist.Distribution]:
        """The distribution at each site x_t on a path x_0…x_T, without masks; at other params where given."""
        values = {**(params or {}), **{f"x_{t}": x for t, x in path.items() if t > 0}}
        sites = self.trace(path[0], values, jax.random.key(0))
        return {t: _unmasked(sites[f"x_{t}"]["fn"]) for t in self.times}

    def total(self, path: Path) -> Float[Array, ""]:
        """The log density of the path as NumPyro counts it, with masks, scales, factors and all, in nats."""
        values = {f"x_{t}": path[t] for t in self.times if t > 0}
        program = handlers.seed(self.program, jax.random.key(0))  # a subsampled plate wants one
        return log_density(compiled_sites(program), (path[0],), {}, {**self.params, **values})[0]

    def log_probs(self, paths: Path) -> dict[int, Float[Array, "S N"]]:
        """Log densities of the sites on paths (S, N, *event), without masks and scales, in nats."""

        return self.each(paths, log_prob)

    def each(self, paths: Path, measure: Callable[[dist.Distribution, Event], Any]) -> dict[int, Any]:
        """`measure` of the distribution at each site x_t and of x_t, on paths (S, N, *event): leading axis S."""

        def one(path: Path) -> dict[int, Any]:
            return {t: measure(kernel, path[t]) for t, kernel in self.kernels(path).items()}

        return jax.vmap(one)(paths)

    def density_moments(self, path: Path) -> dict[int, tuple[Float[Array, "N D"], Float[Array, "N D D"]]]:
        """Mean and covariance of each kernel, were it Gaussian, read off its log density on a path."""
        return {t: density_moments(kernel, path[t]) for t, kernel in self.kernels(path).items()}

    def log_probs_of(self, path: Path, argument: Event) -> dict[int, Float[Array, " N"]]:
        """Log densities of the sites on a path that includes x_0, the program being called with another x_0."""
        program = handlers.uncondition(handlers.seed(self.program, jax.random.key(0)))
        values = {f"x_{t}": x for t, x in path.items()}
        sites = handlers.trace(handlers.substitute(program, data={**self.params, **values})).get_trace(argument)
        return {t: log_prob(_unmasked(sites[f"x_{t}"]["fn"]), path[t]) for t in self.times}

    def linearised(self, path: Path) -> dict[int, Float[np.ndarray, "N D D"]]:
        """The Jacobian of each site's mean in the site before it (q that ascends: x_{t−1}; else x_{t+1})."""
        moving = {t: x for t, x in path.items() if t > 0 or self.ascending}
        size = math.prod(path[0].shape[1:])

        def means(moving: Path) -> dict[int, Float[Array, "N D"]]:
            return {t: moments(kernel, path[t])[0] for t, kernel in self.kernels({**path, **moving}).items()}

        def column(direction: Float[Array, " D"]) -> dict[int, Float[Array, "N D"]]:
            tangents = {t: jnp.broadcast_to(direction.reshape(x.shape[1:]), x.shape) for t, x in moving.items()}
            return jax.jvp(means, (moving,), (tangents,))[1]

        return {
            t: np.moveaxis(np.asarray(columns), 0, -1)
            for t, columns in jax.vmap(column)(jnp.asarray(np.eye(size))).items()
        }

    def curvature(self, path: Path, direction: Path) -> dict[int, Event]:
        """Hessian of the path's log density times `direction` on x_s alone, for s = 0…T: leading axis s."""
        along = {t: np.zeros((len(path), *x.shape), x.dtype) for t, x in direction.items()}
        for t, x in direction.items():
            along[t][t] = x

        def column(tangents: Path) -> Path:
            return jax.jvp(jax.grad(self.total), (path,), (tangents,))[1]

        return jax.vmap(column)(jax.device_put(along))

    def draw(
        self, rng_keys: Key, x_0: Event, measure: Callable[[dist.Distribution, Event], Any]
    ) -> tuple[Path, dict[int, Any]]:
        """Paths from the program, without what it observes, and `measure` as in `each`: leading axis S of the keys."""

        def one(rng_key: Key) -> tuple[Path, dict[int, Any]]:
            unconditioned = compiled_sites(handlers.uncondition(handlers.seed(self.program, rng_key)))
            sites = handlers.trace(handlers.substitute(unconditioned, data=self.params)).get_trace(x_0)
            found = {t: sites[f"x_{t}"] for t in self.times}
            path = {t: site["value"] for t, site in found.items()}
            return path, {t: measure(_unmasked(site["fn"].p), path[t]) for t, site in found.items()}

        return jax.vmap(one)(rng_keys)

    @property
    def ascending(self) -> bool:
        return self.times == sorted(self.times)


def times_of(sites: Sites) -> list[int]:
    """t of the sites x_t, in order."""
    found = [re.fullmatch(r"x_(\d+)", name) for name, site in sites.items() if site["type"] == "sample"]
    return [int(match[1]) for match in found if match]


def _problems(name: str, sites: Sites, x_0: Event, wanted: range) -> list[str]:
    times, (n, *event) = times_of(sites), x_0.shape
    names = ", ".join(f"x_{t}" for t in times) or "none"
    want = f"x_{min(wanted)}, …, x_{max(wanted)}"
    if sorted(times) != list(wanted):
        hint = "; are model and guide swapped?" if (0 in times) != (0 in wanted) else ""
        return [f"{name} has the sites {names}, wanted are {want}{hint}"]
    if times not in (sorted(times), sorted(times, reverse=True)):
        return [f"{name} runs through its sites as {names}; they must ascend or descend in t"]
    problems = []
    for site_name, site in sites.items():
        if site["type"] != "sample":
            continue
        if site_name not in {f"x_{t}" for t in times}:
            if not site["is_observed"]:
                problems.append(f"{name} has another latent site {site_name}")
            continue
        if site["is_observed"] != (site_name == "x_0"):
            problems.append(f"{name}'s site {site_name} is {'' if site['is_observed'] else 'not '}observed")
        fn = site["fn"]
        if wrong := invalid_parameter(fn):
            problems.append(f"{name}'s site {site_name}, a {type(kernel_base(fn)).__name__}, has an invalid {wrong}")
        if (fn.batch_shape, fn.event_shape) != ((n,), tuple(event)):
            problems.append(
                f"{name}'s site {site_name} has batch_shape {fn.batch_shape} and event_shape {fn.event_shape}; "
                f"for {n} data (any number must do) they must be {(n,)} and {tuple(event)}"
            )
    return problems


class Pair:
    """A model p and a guide q, the values of their params, and N data."""

    def __init__(self, model: Program, guide: Program, x: Event, params: Params | None) -> None:
        self.x = x
        self.p, self.q = Chain("p", model), Chain("q", guide)
        initial = {chain.name: self._initial(chain, params or {}) for chain in (self.p, self.q)}
        sites = {name: found[1] for name, found in initial.items()}
        times = {name: times_of(found) for name, found in sites.items()}
        if not any(times.values()) and not (self.p.problems or self.q.problems):
            names = sorted({name for found in sites.values() for name in found})
            raise ValueError(f"neither model nor guide has sites x_0, …, x_T; their sites are {', '.join(names)}")
        self.num_timesteps = max([1, *times["p"], *times["q"]])
        own = {k: {n: s for n, s in v.items() if s["type"] == "param"} for k, v in sites.items()}
        declared = {**own["q"], **own["p"]}
        if params is not None and set(params) != set(declared) and not (self.p.problems or self.q.problems):
            raise ValueError(
                f"params has {_names(params)}; the params of the model and the guide are {_names(declared)}"
            )
        for name, site in declared.items():
            if wrong := _another_shape(site):
                raise ValueError(f"params[{name!r}] has {wrong}")
        self.params: Params = {name: jax.tree.map(_as_array, site["value"]) for name, site in declared.items()}
        self.forward_params = list(own["q"])
        self.reverse_params = [name for name in own["p"] if name not in own["q"]]
        real = (None, dist.constraints.real)
        self.constraints = {n: c for n, s in declared.items() if (c := s["kwargs"].get("constraint")) not in real}
        for chain, wanted in ((self.p, range(self.num_timesteps + 1)), (self.q, range(1, self.num_timesteps + 1))):
            chain.params.update(self.params)
            chain.times = times[chain.name]
            for some, found in zip((x, x[:1]), initial[chain.name][::-1], strict=True):
                if not chain.problems:
                    chain.problems += _problems(chain.name, found, some, wanted)

    def _initial(self, chain: Chain, params: Params) -> list[Sites]:
        """The sites on one datum and on all."""
        chain.params.update(params)
        found: list[Sites] = []
        for x in (self.x[:1], self.x):
            try:
                found.append(chain.described(x) if len(found) == 0 else chain.trace(x, {}, jax.random.key(0)))
            except Exception as error:  # whatever a user's program may raise
                chain.problems.append(f"{chain.name} cannot be run on x of shape {x.shape}: {_one_line(error)}")
                found.append({})
        return found

    @property
    def size(self) -> int:
        """D, the numbers in one datum."""
        return math.prod(self.x.shape[1:])

    def paths(self, rng_key: Key, num_draws: int) -> tuple[Path, dict[int, np.ndarray], dict[int, np.ndarray]]:
        """x_0…x_T from q for each datum, (S, N, *event), and the log densities of q's and p's sites, (S, N), nats."""
        blocks = []
        for keys in self._blocks(rng_key, num_draws):
            path, log_q = self.q.draw(keys, self.x, log_prob)
            path[0] = np.broadcast_to(self.x, (len(keys), *self.x.shape))
            blocks.append((path, log_q, self.p.log_probs(path)))
        return tuple({t: np.concatenate([b[i][t] for b in blocks]) for t in blocks[0][i]} for i in range(3))  # type: ignore[return-value]

    def log_p(self, path: Path) -> dict[int, np.ndarray]:
        """The log densities of p's sites on paths, (S, N), nats."""
        return log_probs_in_blocks(self.p, path)

    def generated(
        self, rng_key: Key, num_draws: int, measure: Callable[[dist.Distribution, Event], Any]
    ) -> tuple[Path, dict[int, Any]]:
        """x_0…x_T from p, (S, N, *event), and `measure` of each of its kernels and draws."""
        blocks = [self.p.draw(keys, self.x, measure) for keys in self._blocks(rng_key, num_draws)]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *blocks)

    def log_p_given_x_1(self, x_1: Array | np.ndarray) -> Float[np.ndarray, "S N"]:
        """log p(x_0 given x_1) of every datum for every x_1 (S, *event), nats."""

        def one(x_1: Event) -> Float[Array, " N"]:
            path = {t: jnp.broadcast_to(x_1, self.x.shape) for t in self.p.times}
            return self.p.kernels({**path, 0: self.x})[0].log_prob(self.x)

        rows, many = max(1, _BLOCK // len(self.x)), jax.jit(jax.vmap(one))  # compiled, the other sites fall away
        blocks = [many(jnp.asarray(x_1[i : i + rows])) for i in range(0, len(x_1), rows)]
        return np.concatenate([np.asarray(block, np.float64) for block in blocks])

    def _blocks(self, rng_key: Key, num_draws: int) -> list[Key]:
        keys = jax.random.split(rng_key, num_draws)
        rows = max(1, _BLOCK // len(self.x))
        return [keys[i : i + rows] for i in range(0, num_draws, rows)]

    def elbo(self, params: Params, rng_key: Key) -> Float[Array, ""]:
        """K of all data for one path each, N17, nats; in double precision where that is on."""
        x = jnp.asarray(self.x, jnp.result_type(float))
        programs = compiled_sites(self.p.program), compiled_sites(self.q.program)
        return -Trace_ELBO().loss(rng_key, params, *programs, x)


def log_probs_in_blocks(chain: Chain, path: Path) -> dict[int, np.ndarray]:
    """`Chain.log_probs` on many paths, (S, N), nats."""
    (S, N), blocks = path[0].shape[:2], []
    rows = max(1, _BLOCK // N)
    for i in range(0, S, rows):
        blocks.append(chain.log_probs({t: jnp.asarray(x[i : i + rows]) for t, x in path.items()}))
    return {t: np.concatenate([block[t] for block in blocks]) for t in chain.times}


def supports(program: Program, params: Params | None, x: np.ndarray) -> set[str]:
    """What the sites x_t of a program draw: "bits", "numbers", or the name of another discrete distribution.

    The program is run on a datum of zeros, which are in the support of both; where it raises, on the first datum.
    Empty where it cannot be run or has no such sites.
    """
    if x.dtype.kind not in "biuf":
        return set()
    for one in (np.zeros_like(x[:1]), x[:1]):
        with suppress(Exception):  # whatever a user's program may raise, which the rows report
            chain = Chain("", program)
            found: set[str] = set()

            def run(x_0: Event, chain: Chain = chain, found: set[str] = found) -> None:
                sites = chain.trace(x_0, params or {}, jax.random.key(0))
                found |= {_support(sites[f"x_{t}"]["fn"]) for t in times_of(sites)}

            jax.eval_shape(run, one)
            return found
    return set()


def _support(kernel: dist.Distribution) -> str:
    support = kernel.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if isinstance(support, type(dist.constraints.boolean)):
        return "bits"
    return type(kernel_base(kernel)).__name__ if kernel.support.is_discrete else "numbers"


def kernel_base(kernel: dist.Distribution) -> dist.Distribution:
    """The distribution within an expanded one and one of independent entries."""
    while isinstance(kernel, dist.ExpandedDistribution | dist.Independent):
        kernel = kernel.base_dist
    return kernel


def invalid_parameter(kernel: dist.Distribution) -> str | None:
    """The name of a parameter that does not satisfy its constraint, where its numbers are known."""
    base = kernel_base(_unmasked(kernel))
    for name, constraint in base.arg_constraints.items():
        value = vars(base).get(name)
        if value is None or isinstance(value, jax.core.Tracer) or dist.constraints.is_dependent(constraint):
            continue
        if not np.all(constraint(np.asarray(value))):
            return name
    return None


@compiled
def moments(kernel: dist.Distribution, y: Event) -> tuple[Float[Array, "N D"], Float[Array, "N D D"]]:
    """Mean and covariance that a distribution states of itself; where it states none, those of `density_moments`."""
    base = kernel_base(kernel)
    try:
        mean = _flat(kernel.mean, y)
        if hasattr(base, "covariance_matrix") and base.event_shape == kernel.event_shape:
            return mean, jnp.broadcast_to(base.covariance_matrix, (*mean.shape, mean.shape[1]))
        if base.event_shape == ():
            return mean, _flat(kernel.variance, y)[..., None] * jnp.eye(mean.shape[1])
    except NotImplementedError:
        pass
    return density_moments(kernel, y)


@compiled
def density_moments(kernel: dist.Distribution, y: Event) -> tuple[Float[Array, "N D"], Float[Array, "N D D"]]:
    """Mean and covariance of a Gaussian, read off the first two derivatives of its log density at y (N, *event)."""
    flat = _flat(y, y)

    def log_prob(flat: Float[Array, "N D"]) -> Float[Array, ""]:
        return kernel.log_prob(flat.reshape(y.shape)).sum()

    def column(direction: Float[Array, " D"]) -> Float[Array, "N D"]:
        return jax.jvp(jax.grad(log_prob), (flat,), (jnp.broadcast_to(direction, flat.shape),))[1]

    precision = -jnp.moveaxis(jax.vmap(column)(jnp.eye(flat.shape[1])), 0, -1)
    cov = jnp.linalg.inv(precision)
    return flat + jnp.einsum("nij,nj->ni", cov, jax.grad(log_prob)(flat)), cov


def _flat(value: Array, like: Event) -> Float[Array, "N D"]:
    value = jnp.asarray(value, like.dtype)  # Normal(0, 1) has a mean of an integer, which has no derivative
    return jnp.broadcast_to(value, like.shape).reshape(len(like), -1)


def _unmasked(kernel: dist.Distribution) -> dist.Distribution:
    if isinstance(kernel, dist.MaskedDistribution):
        return _unmasked(kernel.base_dist)
    if isinstance(kernel, dist.ExpandedDistribution):
        return _unmasked(kernel.base_dist).expand(kernel.batch_shape)
    return kernel


def _another_shape(site: Any) -> str:
    """How the value of a param's site differs in shape or structure from the initial one, where that is a value."""
    if not site["args"]:  # it is a function, as of a network
        return ""
    value, initial = site["value"], site["args"][0]
    leaves, like_leaves = jax.tree.leaves(value), jax.tree.leaves(initial)
    if str(jax.tree.structure(value)) != str(jax.tree.structure(initial)):
        return "another structure than the program gives it"
    for leaf, like in zip(leaves, like_leaves, strict=True):
        if jnp.shape(leaf) != jnp.shape(like):
            return f"an array of shape {jnp.shape(leaf)}; the program gives it {jnp.shape(like)}"
    return ""


def _as_array(leaf: Any) -> Any:
    """A floating-point leaf in the precision that JAX runs in, whatever it was fitted in."""
    return jnp.asarray(leaf, jnp.result_type(float)) if eqx.is_inexact_array_like(leaf) else leaf


def _names(params: Mapping[str, Any]) -> str:
    return ", ".join(sorted(params)) or "none"


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
