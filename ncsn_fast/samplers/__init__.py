"""Sampling methods: programs (tables of fixed steps), procedures (all others), editing, MCMC."""
