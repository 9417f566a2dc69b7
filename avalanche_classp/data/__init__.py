"""In-memory data."""
