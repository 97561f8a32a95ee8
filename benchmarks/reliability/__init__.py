"""What hostile or careless clients do to a server, and what the others notice of it."""
