"""Requests of many clients run together: the queue in which tasks take turns, batches, and the batcher."""
