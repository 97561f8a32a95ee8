"""The verbs of the export package; their modules import nothing heavy before they run."""
