"""The recipe: scenes -> VAE -> latents -> transformer, each stage one resumable command."""
