"""Data sets: in memory and streamed, both through TFDS."""
