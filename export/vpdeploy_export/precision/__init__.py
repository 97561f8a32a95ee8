"""What of a float16 or bfloat16 graph stays float32, how a CPU checks such a graph, and where it leaves tolerance."""
