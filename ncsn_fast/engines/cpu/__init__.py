"""The cpu engine."""
