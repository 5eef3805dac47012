"""ONNX files: from a model to one, its variants, and what it computes in ONNX Runtime."""
