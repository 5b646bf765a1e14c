"""Sampling: rectified flow, its solvers, guidance, and the denoising loop."""
