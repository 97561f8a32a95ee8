"""What lies on disk: documents, tensor files, graphs, bundles; ``Artifact`` reads what an export wrote."""
