"""The main job in one call: what a budget buys, and the searches that it pays for."""
