"""What a path holds, for people and scripts: artifacts, their graphs and engines, and this machine."""
