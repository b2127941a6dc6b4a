"""What hf_cl costs, one benchmark a file, each against its rival in the same run: `hf-cl bench`.

A benchmark's name is its file's name. Its docstring says what is measured, against what, and the floor: the least that
it could cost, and why. Its `run(settings, tell)` yields rows.

    _row      a row, its mark, and what a run was asked for
    _measure  taking turns, medians and quartiles, the machine and its rates
    _child    work in a process of its own, and the memory that it takes
    _models   models of named sizes, with masks and with LoRA, of random weights
    _banks    banks of random masks
    _gather   several benchmarks into one file
    _page     that file as a page with pictures

Invariant: a ratio is made of figures that were taken in turns in one run, and its mark is compared with exactly that
ratio. Data are random and seeded; nothing is downloaded.
"""
