"""The command lines of the project: a mistake is one line."""

import argparse
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser that says what is wrong, where argparse would print its usage too."""

    def error(self, message: str) -> NoReturn:
        """Writes the line to standard error and exits with 2."""
        self.exit(2, f"{self.prog}: {message}\n")
