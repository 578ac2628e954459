"""Benchmarks: what a delay costs, and how this package compares, every ratio within one run.

`make bench`, or `python scripts/bench.py --out=DIR [--only=ITEM,...] [--quick]`. One module an
item; `run.ITEMS` lists them.
"""
