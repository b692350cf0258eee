"""Triton kernels, installed as `ncsn_fast.kernels`.

One file per op, named like the op. A launcher has the signature of its specification, the function
of the same name in `ncsn_fast.ops.reference`, plus optional output buffers: if all are given it
allocates nothing and can be captured in a CUDA graph. Rules for every file:

- Maps are channels-last; C is the fastest axis, accessed 16 bytes at a time if C allows.
- Arithmetic and statistics are float32, reductions have a fixed order, and there are no atomics.
  The result for a sample is bit-identical in any batch and at any position, for tensors aligned to
  16 bytes, as all tensors that torch allocates are. An unaligned view is read in narrower pieces,
  which may change the order of a sum.
- Multiply-adds are fused only where the source says `tl.fma`: every launch disables the compiler's
  own contraction. So normals are bit-identical to those of the C++ kernels on the CPU.
- Kernels depend on torch and triton alone; they import nothing of `ncsn_fast` but each other.
"""
