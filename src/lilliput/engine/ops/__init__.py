"""ONNX operators by family: how each becomes the few operators that kernels compute. The folder is the list."""
