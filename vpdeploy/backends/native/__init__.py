"""The native runner: engines of TensorRT and TensorRT-RTX, run through CUDA without another framework."""
