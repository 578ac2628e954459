"""Real asynchronous training on Ray (extra `ray`): measured staleness, replayed in the simulator.

Start reading at `programs.py`, the two programs that compute; then `server.py`, `worker.py`, and
`train.py`, which drives them. `policy.py` decides what is too stale, `replay.py` runs a recorded
run again. Importing this needs no Ray; running does.
"""
