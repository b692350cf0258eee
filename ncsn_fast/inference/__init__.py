"""A sampling call between Sampler and engine: micro-batches, progress, cost, editing."""
