"""What is compared: the loop and its rivals."""
