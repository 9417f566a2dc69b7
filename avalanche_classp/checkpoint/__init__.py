"""Resume a strategy after a crash."""
