"""From patterns and lengths to positions: the only place that does this arithmetic.

table.py   the table of a kernel: columns to gather, and rows of queries
kept.py    the entries that a decoder keeps, and how a step changes them
places.py  the positions of queries and keys in the sequences that they belong to
lines.py   blocks of a sequence, and offsets inside them
"""
