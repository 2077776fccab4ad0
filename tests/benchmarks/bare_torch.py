"""`bare` in PyTorch: the same network, loss and optimiser as a loop over steps, its ELBO and its ancestral sampling."""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class Network(nn.Module):
    def __init__(self, D, width, depth):
        super().__init__()
        self.first = nn.Linear(D, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.shifts = nn.ModuleList(nn.Linear(17, width, bias=False) for _ in range(depth))
        self.last = nn.Linear(width, 2 * D)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.register_buffer("wavelength", torch.tensor(np.geomspace(4.0, 64.0, 8), dtype=torch.float32))

    def forward(self, x, log_snr):
        angle = 2 * math.pi * log_snr.clamp(-20, 20)[:, None] / self.wavelength
        embedding = torch.cat([angle.sin(), angle.cos(), torch.tanh(log_snr / 8)[:, None]], 1)
        h = self.first(x)
        for block, shift in zip(self.blocks, self.shifts, strict=True):
            h = h + block(functional.silu(h + shift(embedding)))
        return self.last(functional.silu(h))


class Diffusion(nn.Module):
    def __init__(self, D, width, depth, T):
        super().__init__()
        self.network, self.T = Network(D, width, depth), T
        alpha_bar = torch.sigmoid(torch.linspace(5.0, -2.0, T))
        beta = 1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]])
        self.logits = nn.Parameter(torch.log(beta) - torch.log1p(-beta))

    @classmethod
    def of(cls, params, T):
        """The same params as those of `bare`."""
        network = params["network"]
        D, width = network["first"][0].shape
        model = cls(D, width, len(network["blocks"]), T)

        def tensor(a):
            return torch.tensor(np.asarray(a))

        with torch.no_grad():
            layers = [(model.network.first, network["first"]), (model.network.last, network["last"])]
            layers += list(zip(model.network.blocks, network["blocks"], strict=True))
            for layer, (weight, bias) in layers:
                layer.weight.copy_(tensor(weight).T)
                layer.bias.copy_(tensor(bias))
            for layer, weight in zip(model.network.shifts, network["shifts"], strict=True):
                layer.weight.copy_(tensor(weight).T)
            model.logits.copy_(tensor(params["logits"]))
        return model

    def levels(self):
        beta = torch.sigmoid(self.logits)
        log_alpha = torch.log1p(-beta)
        return beta, log_alpha, torch.cat([torch.zeros(1), torch.cumsum(log_alpha, 0)])

    def kernel(self, x_t, t, levels):
        """Mean and variance of p(x_{t-1} given x_t), and its predicted x_0."""
        beta, log_alpha, log_alpha_bar = levels
        keep, keep_prev, b = log_alpha_bar[t], log_alpha_bar[t - 1], beta[t - 1]
        var = -torch.expm1(keep)
        outputs = self.network(x_t, (keep - torch.log(var)).clamp(-30, 30))
        D = x_t.shape[1]
        rho = -torch.expm1(keep_prev) / var
        of_x_0 = torch.exp(0.5 * keep_prev) * b / var
        of_x_t = torch.exp(0.5 * log_alpha[t - 1]) * rho
        x_0_hat = torch.exp(0.5 * keep)[:, None] * x_t + torch.sqrt(var)[:, None] * outputs[:, :D]
        wide = rho[:, None] + (1 - rho)[:, None] * torch.exp(16 * torch.tanh(outputs[:, D:] / 8))
        mean = of_x_0[:, None] * x_0_hat + of_x_t[:, None] * x_t
        return mean, b[:, None] * wide, x_0_hat, rho[:, None] / wide, of_x_0

    def terms(self, x_0, t, noise):
        """The term of the negative ELBO at t of each datum, and the prior's."""
        levels = self.levels()
        log_alpha_bar = levels[2]
        keep = log_alpha_bar[t]
        x_t = torch.exp(0.5 * keep)[:, None] * x_0 + torch.sqrt(-torch.expm1(keep))[:, None] * noise
        mean, var, x_0_hat, ratio, of_x_0 = self.kernel(x_t, t, levels)
        first = (t == 1)[:, None]
        reconstruction = 0.5 * ((x_0 - mean) ** 2 / var + torch.log(2 * math.pi * var))
        ratio = torch.where(first, 1.0, ratio)
        kl = 0.5 * (ratio + (of_x_0[:, None] * (x_0 - x_0_hat)) ** 2 / var - 1 - torch.log(ratio))
        last = log_alpha_bar[-1]
        prior = 0.5 * (torch.exp(last) * x_0**2 - torch.expm1(last) - 1 - torch.log(-torch.expm1(last))).sum(1)
        return torch.where(first, reconstruction, kl).sum(1), prior

    def forward(self, x_0, u, noise):
        """The negative ELBO per datum, as `bare.loss`."""
        B = len(x_0)
        t = torch.clamp(1 + torch.floor(self.T * ((torch.arange(B) / B + u) % 1.0)).long(), max=self.T)
        terms, prior = self.terms(x_0, t, noise)
        return (self.T * terms + prior).mean()

    @torch.no_grad()
    def elbo(self, x_0):
        """All T terms, one draw of x_t for each, (N,)."""
        total = 0.0
        for t in range(1, self.T + 1):
            terms, prior = self.terms(x_0, torch.full((len(x_0),), t), torch.randn_like(x_0))
            total = total - terms
        return total - prior

    @torch.no_grad()
    def sample(self, n, D):
        x, levels = torch.randn(n, D), self.levels()
        for t in range(self.T, 0, -1):
            mean, var, *_ = self.kernel(x, torch.full((n,), t), levels)
            x = mean + var.sqrt() * torch.randn_like(x)
        return x


def _update(loss, model, optimizer, rate):
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    rate.step()


def training(model, x, batch_size, num_steps, compiled=False):
    """A function that takes as many steps of Adam as it is told to."""
    groups = [{"params": model.network.parameters()}, {"params": [model.logits], "lr": 2e-2}]
    optimizer = torch.optim.Adam(groups, lr=2e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    loss_of = torch.compile(model) if compiled else model

    def run(steps):
        for _ in range(steps):
            x_0 = x[torch.randint(len(x), (batch_size,))]
            loss = loss_of(x_0, torch.rand(()), torch.randn_like(x_0))
            _update(loss, model, optimizer, rate)
        return float(loss)

    return run


def diffusers_training(D, width, depth, T, x, batch_size, num_steps):
    """The usual loop around diffusers' DDPMScheduler: the mean squared error of the predicted noise."""
    from diffusers import DDPMScheduler

    scheduler, network = DDPMScheduler(num_train_timesteps=T), Network(D, width, depth)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    log_snr = torch.log(scheduler.alphas_cumprod) - torch.log1p(-scheduler.alphas_cumprod)

    def run(steps):
        for _ in range(steps):
            x_0 = x[torch.randint(len(x), (batch_size,))]
            noise, t = torch.randn_like(x_0), torch.randint(T, (batch_size,))
            x_t = scheduler.add_noise(x_0, noise, t)
            loss = functional.mse_loss(network(x_t, log_snr[t])[:, :D], noise)
            _update(loss, network, optimizer, rate)
        return float(loss)

    return run
