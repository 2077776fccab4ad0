"""Posterior samplers of diffuse-jax with the exact denoiser of a Gaussian mixture.

    pip install diffuse-jax==0.1.1
    python tests/benchmarks/guidance_jax.py LEVEL M K [NAME …]

K is the number of denoiser evaluations for each draw. Distinct calls of the denoiser and Jacobian products through it
count alike: a sampler takes K // (evaluations in a step) steps. "SDE" is the usual linear VP schedule with
Euler-Maruyama steps, "Flow" the README's rectified flow with Euler steps; the strength of DPS is the default or
"tuned", on other problems. FPS is one run of 1,000 particles; the others draw independently.
"""

import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from guidance_problems import DRAWS, D, path, save

try:
    from diffuse.base_forward_model import MeasurementState
    from diffuse.denoisers.cond import DPSDenoiser, FPSDenoiser, TMPDenoiser
    from diffuse.diffusion.sde import SDE, Flow, LinearSchedule
    from diffuse.examples.gaussian_mixtures.forward_models.matrix_product import MatrixProduct
    from diffuse.integrator import EulerIntegrator, EulerMaruyamaIntegrator
    from diffuse.predictor import Predictor
    from diffuse.timer import VpTimer
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install diffuse-jax==0.1.1") from None

MODELS = {
    "SDE": (SDE(LinearSchedule(b_min=0.1, b_max=20.0, t0=0.0, T=1.0)), EulerMaruyamaIntegrator),
    "Flow": (Flow(tf=1.0), EulerIntegrator),
}
# The last entry is the number of evaluations in a step: the integrator's call, which all Jacobian products there share,
# and those products: one in DPS, five in TMP, four of them in the three iterations of conjugate gradients.
SAMPLERS = {
    "DPS, default, SDE": (DPSDenoiser, "SDE", {}, 2),
    "DPS, default, Flow": (DPSDenoiser, "Flow", {}, 2),
    "DPS, tuned, SDE": (DPSDenoiser, "SDE", {"zeta": 0.5}, 2),
    "DPS, tuned, Flow": (DPSDenoiser, "Flow", {"zeta": 0.5}, 2),
    "TMP, SDE": (TMPDenoiser, "SDE", {}, 6),
    "TMP, Flow": (TMPDenoiser, "Flow", {}, 6),
    "FPS, SDE": (FPSDenoiser, "SDE", {}, 1),
    "FPS, Flow": (FPSDenoiser, "Flow", {}, 1),
}


def mixture_score(model, weights, means, variances):
    """∇ log p_t(x) of a mixture whose components share the covariance diag(variances)."""

    def score(x, t):
        alpha, sigma = model.signal_level(t), model.noise_level(t)
        total = alpha**2 * variances + sigma**2
        logits = means @ (alpha * x / total) - 0.5 * alpha**2 * means**2 @ (1 / total) + jnp.log(weights)
        return (alpha * jax.nn.softmax(logits) @ means - x) / total

    return score


@partial(jax.jit, static_argnames=("name", "steps"))
def run(key, name, steps, prior, A, y, noise):
    kind, model, options, _ = SAMPLERS[name]
    model, integrator = MODELS[model]
    sampler = kind(
        integrator=integrator(model=model, timer=VpTimer(n_steps=steps, eps=0.001, tf=1.0)),
        model=model,
        predictor=Predictor(model, mixture_score(model, *prior), "score"),
        forward_model=MatrixProduct(A, noise),
        x0_shape=(D,),
        **options,
    )
    state, _ = sampler.generate(key, MeasurementState(y, A), steps, DRAWS)
    return state.integrator_state.position


def solve(name, steps, prior, p, n):
    """Draws (DRAWS, D) for the n-th problem of p."""
    return run(jax.random.key(n), name, steps, prior, p["A"][n], p["y"][n], p["noise"][n])


def main():
    level, M, K, *names = sys.argv[1:]
    p = {k: jnp.asarray(v, jnp.float32) for k, v in np.load(path(level, M)).items()}
    prior = p["weights"], p["means"], p["variances"]
    draws, meta = {}, {}
    for name in names or SAMPLERS:
        cost = SAMPLERS[name][3]
        steps = int(K) // cost
        start = time.perf_counter()
        solve(name, steps, prior, p, 0).block_until_ready()
        first = time.perf_counter() - start
        start = time.perf_counter()
        draws[name] = np.stack([solve(name, steps, prior, p, n) for n in range(len(p["y"]))])
        seconds = (time.perf_counter() - start) / len(p["y"])
        meta[name] = {"steps": steps, "cost": cost, "seconds": seconds, "first": first}
        text = f"{steps} steps of {cost} evaluations, {seconds:.2f} s a problem, {first:.1f} s the first"
        print(f"{name}: {text}", flush=True)
    save("diffuse", level, M, K, draws, meta)


if __name__ == "__main__":
    main()
