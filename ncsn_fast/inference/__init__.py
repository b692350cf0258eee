"""Between Sampler and engine, a sampling call: micro-batches, progress, cost, editing."""
