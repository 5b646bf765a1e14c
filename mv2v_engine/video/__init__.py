"""Files to frames and back (`io`), and frames to the model's window and size (`transforms`)."""
