"""The mathematics of diffusion, without a network: SDEs, noise schedules, objectives."""
