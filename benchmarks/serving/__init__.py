"""What a server costs: its front end alone, and against other ways to serve the same tasks."""
