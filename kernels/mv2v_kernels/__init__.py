"""Triton launchers of the engine's operations, one module per operation; torch and Triton only."""
