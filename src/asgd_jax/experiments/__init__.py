"""What the paper shows, run from one command each."""
