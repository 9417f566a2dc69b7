"""How values are chosen."""
