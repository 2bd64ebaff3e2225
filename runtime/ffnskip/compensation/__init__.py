"""What is added in place of a skipped FFN: the kinds, and the numbers of one layer at work."""
