"""The HTTP server: Open Inference Protocol v2, a plain image API, and metrics, over one batcher."""
