"""Lowerings of ONNX operators by family: each becomes operators that kernels compute. The folder is the list."""
