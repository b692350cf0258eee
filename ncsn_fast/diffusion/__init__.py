"""Mathematics of diffusion, independent of any network: SDEs, noise schedules, objectives."""
