"""Networks as ONNX models, and the ort engine that runs them in ONNX Runtime."""
