"""Stochastic variational inference of a chain."""
