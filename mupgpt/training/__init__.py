"""What training is made of: the step, populations of members, metrics, health and alarms."""
