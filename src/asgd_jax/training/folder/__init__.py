"""What a run keeps on disk: checkpoints, metrics, whose run it is, and what made it.

Imports nothing of training but itself: it is told what to write. Start reading at `rerun`, which
decides what a folder that is there already means; `checkpoint` is what a killed run goes on from.
"""
