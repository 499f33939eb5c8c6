"""What is done with the folder of a run: launch it, branch it, sample from it, read it."""
