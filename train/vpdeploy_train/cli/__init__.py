"""The verbs of the training package; their modules import nothing heavy before they run."""
