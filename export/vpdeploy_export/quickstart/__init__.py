"""``vpdeploy quickstart``: the whole main job on real images, in minutes."""
