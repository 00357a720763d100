"""The state of groups, for everything that shows it: command line, Flower, metrics, doctor."""
