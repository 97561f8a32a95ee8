"""ONNX files: tracing a graph module, facts of the result, writing it."""
