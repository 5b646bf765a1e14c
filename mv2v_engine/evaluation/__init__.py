"""Measures on worlds whose geometry is known exactly."""
