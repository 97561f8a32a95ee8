"""Measure how fast an exported model runs here, alone or side by side with another, in turns."""
