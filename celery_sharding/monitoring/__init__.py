"""What is so: the state of groups, for every face that shows it."""
