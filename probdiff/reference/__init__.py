"""Densities known without Monte Carlo, in float64."""
