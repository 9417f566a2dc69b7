"""Continual-learning experiments: one config, one run, one result file, one report."""
