"""The command line: `hf-cl <verb>`, one file a verb, and no logic of learning in any of them.

    train      hf_cl.train_stream      a recipe becomes a run folder
    sweep      hf_cl.sweep             a recipe for every combination of values, on validation rows
    report     hf_cl.report            runs beside each other on one page
    eval       hf_cl.runs, hf_cl.data  every task of a run, measured again from its files
    inspect    hf_cl.storage           what a run or a bank holds
    verify     hf_cl.runs, hf_cl.bank  whether anything a finished task reads has moved
    predict    hf_cl.bank              a bank's task answers texts, as JSON lines
    export     hf_cl.bank              a task as a plain checkpoint or a PEFT adapter
    drop       hf_cl.bank              a bank without one of its tasks
    push, pull hf_cl.bank              a bank to the Hub, and from it
    plan       hf_cl.capacity          how many tasks a bank has room for
    methods    hf_cl.plugins           the ways to learn, and their options
    bench      hf_cl.bench             what it costs on this machine, beside its rivals

Exit codes: 0 done, 1 something has moved (`verify` alone), 2 bad input or a run that cannot go on, 130 Ctrl-C.
With `--json`, stdout carries one JSON value and nothing else. What is heavy is imported inside a verb, so that
`hf-cl --help` answers at once.
"""

from hf_cl.cli.app import app as app
from hf_cl.cli.app import main as main
