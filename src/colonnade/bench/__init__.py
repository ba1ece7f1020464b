"""Measure attention on this machine, one job a file.

- `timing`: alternatives timed side by side, and the ceiling that arithmetic sets;
- `memory`: the peak memory of one of them, and whether a boolean mask has room;
- `flex`: FlexAttention as another contender;
- `device`, `rivals`, `rows` and `report`: the same on a GPU, by `make gpu`.

`memory` and `flex` measure in processes of their own, `python -m colonnade.bench.memory` and
`python -m colonnade.bench.flex`; both explain their arguments under --help.
"""
