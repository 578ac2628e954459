"""The recipes: one file an experiment, its arms by argument. They import the library only."""
