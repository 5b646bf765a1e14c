"""The diffusion transformer over token plans."""
