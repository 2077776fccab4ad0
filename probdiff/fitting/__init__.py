"""Stochastic variational inference of a diffusion."""
