"""How it is run: one run, many runs, their records."""
