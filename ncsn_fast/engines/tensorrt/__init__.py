"""The trt engine: building, caching and running TensorRT engines."""
