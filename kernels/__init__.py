"""Triton kernels, installed as `ncsn_fast.kernels`; this version has none yet.

One file per op with the op's basename: `instance_norm_plus.py`, `sampler_update.py`. A launcher has
the signature of the function of that name in `ncsn_fast.reference`, which is its specification:
layouts, float32 statistics and state, and the noise contract of `ncsn_fast.noise` bit for bit on
words and uniforms. Kernels depend on torch and triton alone; they never import `ncsn_fast`.
"""
