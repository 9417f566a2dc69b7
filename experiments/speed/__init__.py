"""Benchmarks of speed and memory; ``python -m experiments.speed`` runs them."""
