"""TensorRT engine: building, caching and running plans."""
