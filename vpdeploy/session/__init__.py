"""Loaded tasks that share one graph on one device: slots and leases, the session, and its predictions."""
