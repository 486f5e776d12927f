"""The model's side of the seam: denoiser specs, the block stack, and which step a call belongs to."""
