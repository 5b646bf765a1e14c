"""Several processes of one torchrun on one forward: who they are, and what they exchange."""
