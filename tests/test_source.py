"""The promise that one person can read archive.py in one sitting."""

import ast

from conftest import PROGRAM

MOST_LINES, WIDEST = 4_090, 96  # of the file, with comments and empty lines; columns
LONGEST_FUNCTION = 60  # lines, from `def` to its last


def test_the_program_does_not_grow():
    """The goal is 3,100 lines: lower the number whenever the program gets shorter."""
    assert len(PROGRAM.read_text("utf-8").splitlines()) <= MOST_LINES


def test_no_line_of_the_program_is_wider_than_96_columns():
    lines = PROGRAM.read_text("utf-8").splitlines()
    wide = {number: line for number, line in enumerate(lines, 1) if len(line) > WIDEST}
    assert wide == {}


def test_no_function_of_the_program_is_longer_than_60_lines():
    functions = [
        node
        for node in ast.walk(ast.parse(PROGRAM.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lengths = [(node.name, node.end_lineno - node.lineno + 1) for node in functions]
    assert len(lengths) > 100, "they were found"
    assert [found for found in lengths if found[1] > LONGEST_FUNCTION] == []
