"""One turn, start to end: what is asked, what is remembered, what is denoised, what is kept."""
