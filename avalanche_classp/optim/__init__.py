"""The optimizer; needs torch alone."""
