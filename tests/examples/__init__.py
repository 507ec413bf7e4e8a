"""Files as a user may write them: given to the trainer by their paths."""
