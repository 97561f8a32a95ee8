"""vpdeploy_export: compiling runs into ONNX graphs and bundles (extra ``export``)."""
