"""What is run: config, benchmarks, models, methods, settings."""
