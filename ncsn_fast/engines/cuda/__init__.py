"""CUDA engine, and the sampling loop in CUDA graphs."""
