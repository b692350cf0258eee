"""Training: configurations, state and steps of a run, the toy figures; the loop is the command."""
