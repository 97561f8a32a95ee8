"""vpdeploy_train: learning and pruning prompt sets on a frozen timm vision transformer (extra ``train``)."""
