"""What is estimated, with its uncertainty."""
