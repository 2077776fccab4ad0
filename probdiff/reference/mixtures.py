"""Mixtures of Gaussians on the line, seen through Gaussian noise: what every component becomes."""

from typing import Any

import numpy as np


def components_given(
    weights: Any, means: Any, variances: Any, x: Any, shrink: Any, noise_variance: Any, xp: Any = np
) -> tuple[Any, Any, Any]:
    """Of each component of y ~ Σ_k w_k N(m_k, v_k), given x = shrink·y + N(0, noise_variance).

    log w_k N(x given shrink·m_k, shrink²·v_k + noise_variance), nats, then mean and variance of y given x and k. All
    broadcast, the last axis is that of the components; `xp` is NumPy or `jax.numpy`.
    """
    total = shrink**2 * variances + noise_variance
    residual = x - shrink * means
    log_joint = xp.log(weights) - 0.5 * residual**2 / total - 0.5 * xp.log(2 * np.pi * total)
    return log_joint, means + shrink * variances / total * residual, variances * noise_variance / total
