"""Artifacts: ONNX files, packed files, and the guard that compares them with the model they came from."""
