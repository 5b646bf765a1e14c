"""What a session remembers: finished videos' latents, and which of them a new turn should see."""
