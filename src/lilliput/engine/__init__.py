"""The engine: a compiler from ONNX to a readable C program whose kernels do only the work that zeros leave."""
