"""The laboratory: the demo, the paper's figures and what they have in common; not in the wheel.

It uses the library as anyone would, and takes its recipes from `configs`. Begin with
`reproduce.py`, which runs, draws and checks one figure of `figures`.
"""
