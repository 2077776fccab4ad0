"""Posterior samplers of azula (PyTorch) with the exact denoiser of a Gaussian mixture.

    pip install torch==2.13.0 azula==0.11.1
    python tests/benchmarks/guidance_torch.py LEVEL M K [NAME …]

K is the number of denoiser evaluations for each draw. Calls of the denoiser and vector-Jacobian products through it
count alike, and are counted as they happen: a sampler takes K // (evaluations in a step) steps. Schedule,
stochasticity and the first twist are those of azula's tutorial on guidance with a Gaussian mixture
(docs/tutorials/guidance_gmm.ipynb), and the strengths of guidance are azula's, but for what is "tuned", on other
problems. "ideal" has the posterior's own denoiser. TDS is one run of 1,000 particles, which it resamples at each
step, or K // 100 runs of 50 steps, of which 1,000 particles are picked; all others draw independently.
"""

import sys
import time

import numpy as np
from guidance_problems import DRAWS, D, path, save

try:
    import torch
    from azula import guidance, sample
    from azula.denoise import Denoiser, DiracPosterior
    from azula.linalg.covariance import FullCovariance, IsotropicCovariance
    from azula.noise import RectifiedSchedule
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install torch==2.13.0 azula==0.11.1") from None


class Mixture(Denoiser):
    """E[x_0 given x_t] of a mixture whose components share the covariance basis · diag(variances) · basisᵀ."""

    def __init__(self, weights, means, variances, basis=None):
        super().__init__()
        self.schedule, self.evaluations, self.basis = RectifiedSchedule(), 0, basis
        self.log_weights, self.variances = torch.log(weights + 1e-37), variances
        self.means = means if basis is None else means @ basis

    def forward(self, x_t, t):
        alpha, sigma = self.schedule(t)
        x = x_t if self.basis is None else x_t @ self.basis
        total = alpha**2 * self.variances + sigma**2
        logits = alpha * (x / total) @ self.means.T - 0.5 * alpha**2 * (self.means**2 / total).sum(1) + self.log_weights
        self.count()
        if logits.requires_grad:
            logits.register_hook(self.count)
        mean = torch.softmax(logits, -1) @ self.means
        mean = mean + alpha * self.variances / total * (x - alpha * mean)
        return DiracPosterior(mean if self.basis is None else mean @ self.basis.T)

    def count(self, _=None):
        self.evaluations += 1


class Pooled:
    """Draws picked at random from several runs of a sampler."""

    def __init__(self, make, runs):
        self.make, self.runs = make, runs

    def init(self, shape):
        return shape

    def __call__(self, shape):
        x = torch.cat([sampler(sampler.init(shape)) for sampler in (self.make() for _ in range(self.runs))])
        return x[torch.randperm(len(x))[: shape[0]]]


def samplers(prior, p, n):
    """For each name a function of the number of steps that makes the sampler for problem n."""
    A, y, noise = tensor(p["A"][n]), tensor(p["y"][n]), float(p["noise"][n])
    M = len(y)
    cov_y, inverse, gram = IsotropicCovariance(noise**2), torch.linalg.pinv(A), A @ A.T
    values, vectors = torch.linalg.eigh(
        tensor(np.diag(p["variances"]) + np.cov(p["means"].T, aweights=p["weights"], ddof=0))
    )
    post_values, post_vectors = np.linalg.eigh(p["post_covariance"][n])
    ideal = Mixture(*map(tensor, (p["post_weights"][n], p["post_means"][n], post_values, post_vectors)))

    def apply(x):
        return x @ A.T

    def distance(x):  # azula's DPS takes one norm over the whole batch: a sum of norms keeps the draws apart
        return torch.linalg.vector_norm(y - x @ A.T, dim=-1).sum()[None]

    def twist_tutorial(x, ratio):
        sd = torch.sqrt(noise**2 + ratio**2 * torch.diag(gram))
        return torch.distributions.Normal(y, sd, validate_args=False).log_prob(x @ A.T)

    def twist(x, ratio):  # the variance of x_0 given x_t where that of x_0 is 1, as it is after standardising
        factor = torch.linalg.cholesky(noise**2 * torch.eye(M) + ratio**2 / (1 + ratio**2) * gram)
        normal = torch.distributions.MultivariateNormal(y, scale_tril=factor, validate_args=False)
        return normal.log_prob(x @ A.T)

    def ddim(denoiser, eta=1.0):
        return lambda steps: sample.DDIMSampler(denoiser, eta=eta, steps=steps, silent=True)

    def dps(zeta):
        return lambda steps: guidance.DPSSampler(prior, torch.zeros(1), distance, zeta=zeta, steps=steps, silent=True)

    def mmps(iterations):
        return ddim(guidance.MMPSDenoiser(prior, y, apply, cov_y, iterations=iterations))

    def tds(function):
        return lambda steps: guidance.TDSSampler(prior, function, steps=steps, silent=True)

    def pooled(steps):
        return Pooled(lambda: tds(twist)(min(steps, 50)), -(-steps // 50))

    def pgdm(inverse):
        def back(v):
            return v @ inverse.T

        return lambda steps: guidance.PGDMSampler(prior, y, apply, back, eta=1.0, steps=steps, silent=True)

    def jfps(iterations):
        cov_x = FullCovariance(vectors, values)
        return ddim(guidance.JFPSDenoiser(prior, y, apply, cov_y, cov_x, iterations=iterations))

    def diffpir(lmbda, iterations=1):
        return ddim(guidance.DiffPIRDenoiser(prior, y, apply, noise**2, lmbda=lmbda, iterations=iterations))

    return ideal, {
        "ideal": ddim(ideal),
        "DPS": dps(1.0),
        "PGDM": pgdm(inverse),
        "PGDM, damped inverse": pgdm(A.T @ torch.linalg.inv(gram + noise**2 * torch.eye(M))),
        "DiffPIR, default": diffpir(10.0),
        "DiffPIR, tuned": diffpir(0.1, M),
        "TMPD": ddim(guidance.TMPDenoiser(prior, y, apply, noise**2)),
        "MMPS, 1 iteration": mmps(1),
        "MMPS, 3 iterations": mmps(3),
        "MMPS, exact solve": mmps(min(M, 8)),
        "JFPS, default": jfps(1),
        "JFPS, exact solve": jfps(M),
        "TDS, tutorial": tds(twist_tutorial),
        "TDS, bounded": tds(twist),
        "TDS, bounded, runs of 50 steps": pooled,
    }


def tensor(a):
    return torch.tensor(np.asarray(a), dtype=torch.float32)


def run(make, denoisers, steps):
    """1,000 draws, seconds and evaluations."""
    before = sum(d.evaluations for d in denoisers)
    start = time.perf_counter()
    sampler = make(steps)
    x = sampler(sampler.init((DRAWS, D)))
    return x.numpy(), time.perf_counter() - start, sum(d.evaluations for d in denoisers) - before


def main():
    torch.set_num_threads(1)
    level, M, K, *names = sys.argv[1:]
    p = np.load(path(level, M))
    prior = Mixture(*map(tensor, (p["weights"], p["means"], p["variances"])))
    draws, meta = {}, {}
    for name in names or samplers(prior, p, 0)[1]:
        xs, seconds = [], []
        for n in range(len(p["y"])):
            torch.manual_seed(n)
            ideal, makers = samplers(prior, p, n)
            cost = run(makers[name], (prior, ideal), 2)[2] / 2
            steps = int(int(K) // cost)
            x, s, evaluations = run(makers[name], (prior, ideal), steps)
            if evaluations != steps * cost:
                raise AssertionError(f"{name}: {evaluations} evaluations in {steps} steps")
            xs.append(x)
            seconds.append(s)
        draws[name], meta[name] = np.stack(xs), {"steps": steps, "cost": cost, "seconds": float(np.mean(seconds))}
        print(f"{name}: {steps} steps of {cost:g} evaluations, {np.mean(seconds):.2f} s a problem", flush=True)
    save("azula", level, M, K, draws, meta)


if __name__ == "__main__":
    main()
