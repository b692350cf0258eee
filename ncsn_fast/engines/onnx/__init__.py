"""ONNX models of the networks, and the ort engine, which runs them in ONNX Runtime."""
