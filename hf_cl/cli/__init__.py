"""The command line: `hf-cl <verb>`, one file a verb, and no logic of learning in any of them.

    train      hf_cl.train_stream      a recipe becomes a run folder
    eval       hf_cl.runs, hf_cl.data  every task of a run, measured again from its files
    inspect    hf_cl.storage           what a run holds
    verify     hf_cl.runs              whether anything a finished task reads has moved
    methods    hf_cl.plugins           the ways to learn, and their options

Exit codes: 0 done, 1 something has moved (`verify` alone), 2 bad input or a run that cannot go on, 130 Ctrl-C.
With `--json`, stdout carries one JSON value and nothing else. What is heavy is imported inside a verb, so that
`hf-cl --help` answers at once.
"""

from hf_cl.cli.app import app as app
from hf_cl.cli.app import main as main
