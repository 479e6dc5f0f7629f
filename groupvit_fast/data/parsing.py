"""One lock for everything here that runs Python's parser.

CPython 3.11 fails now and then when two threads parse at once (gh-106905). NumPy reads the head of a stored
array with the parser, and DALI the source of a graph with conditions.
"""

import threading

PARSING = threading.Lock()
