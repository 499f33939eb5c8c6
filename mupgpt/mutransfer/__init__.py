"""From tuned values at a proxy to the config of a target, axis by axis."""
