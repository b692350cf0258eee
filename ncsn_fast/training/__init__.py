"""Training: configurations, the loop, the toy figures."""
