"""A pair of chains written by hand with `numpyro.sample` alone, any piece of which can be replaced by a wrong one."""

from contextlib import nullcontext

import jax
import numpyro
import numpyro.distributions as dist
import pytest

from probdiff.derivation.pair import Chain

PIECES = {
    "shift": 0,  # of β in t
    "back": 1,  # steps that the guide looks back
    "times": None,  # the order of the guide; ascending if None
    "seen": lambda beta: beta,  # what the guide makes of β before it is used
    "first": None,  # where the reverse chain starts; at T if None
    "peeked": lambda mean, x_0: mean,  # what the model makes of x_0
    "model_plate": lambda n: numpyro.plate("data", n),
    "wrap_model": lambda name: nullcontext(),
    "wrap_guide": lambda name: nullcontext(),
    "extra_model": lambda sites: None,
    "extra_guide": lambda sites: None,
}


class Hand:
    """`pieces` are those of a family: "beta", "mean", and as functions of the pair and what they are given
    "step" (x_{t−1}, β_t), "start" (x_0) and "reverse" (the mean, t), the distributions of x_t, x_T and x_{t−1}.
    """

    def __init__(self, pieces, **slip):
        self.__dict__.update(PIECES | pieces | slip)

    def guide(self, x_0):
        beta = self.seen(numpyro.param("beta", self.beta, constraint=dist.constraints.unit_interval))
        with numpyro.plate("data", len(x_0)):
            xs = {0: x_0}
            x = x_0
            for t in self.times or range(1, len(beta) + 1):
                b = beta[(t - 1 - self.shift) % len(beta)]
                with self.wrap_guide(f"x_{t}"):
                    x = xs[t] = numpyro.sample(f"x_{t}", self.step(self, xs.get(t - self.back, x), b))
            self.extra_guide(xs)

    def model(self, x_0):
        first = self.first or len(self.beta)
        with self.model_plate(len(x_0)):
            with self.wrap_model(f"x_{first}"):
                x = numpyro.sample(f"x_{first}", self.start(self, x_0))
            xs = {first: x}
            for t in range(first, 0, -1):
                kernel = self.reverse(self, self.peeked(self.mean(x, t), x_0), t)
                with self.wrap_model(f"x_{t - 1}"):
                    x = xs[t - 1] = numpyro.sample(f"x_{t - 1}", kernel, obs=x_0 if t == 1 else None)
            self.extra_model({**xs, 0: x_0})


def slow_unless(names, quick):
    """The names as cases, all but the quick of which are run with the slow tests alone."""
    assert set(quick) <= set(names)
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def only(name, handler):
    """`handler` at the site of that name alone."""
    return lambda site: handler if site == name else nullcontext()


def compile_once(monkeypatch):
    """What runs a chain's program on arrays is compiled once, for checks of one pair that differ in their seed."""
    compiled = {}
    methods = {name: getattr(Chain, name) for name in ("each", "draw", "total", "log_probs_of")}
    for name, method in methods.items():

        def call(chain, *arguments, name=name, method=method):
            functions = [one for one in arguments if callable(one)]
            arrays = [one for one in arguments if not callable(one)]
            key = (name, chain.name, *(getattr(function, "__wrapped__", function).__code__ for function in functions))
            if key not in compiled:
                compiled[key] = jax.jit(lambda *arrays: method(chain, *arrays, *functions))
            return compiled[key](*arrays)

        monkeypatch.setattr(Chain, name, call)
