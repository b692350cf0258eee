"""Triton kernels, installed as `ncsn_fast.kernels`.

One file per op with the op's basename. A launcher has the signature of the function of that name in
`ncsn_fast.ops.reference`, which is its specification, plus the buffers it may write into: with all
of them given it allocates nothing and can be captured in a CUDA graph. Rules that hold for every
file:

- Maps are channels-last; the fastest axis is C, read and written 16 bytes at a time where C allows.
- Arithmetic and statistics are float32, reductions have a fixed order, nothing is atomic. No bit of
  a sample depends on the batch it is in or on its place there, among tensors that start at a
  multiple of 16 bytes, as all that torch allocates do: a view that does not is read in narrower
  pieces, which may change the order of a sum.
- Multiply-adds are fused where the source says `tl.fma` and nowhere else: every launch turns the
  compiler's own contraction off. So normals have the bits of the C++ kernels on the CPU.
- Kernels depend on torch and triton alone; they import nothing of `ncsn_fast` but each other.
"""
