"""Runs beside each other on one page: what they reached, what it costs, and what they can be compared by.

    read      result files -> checked results
    groups    runs that may be compared; series of seeds; means and intervals
    paired    two series on the same rows -> their difference and its interval
    axes      what pictures have in common: colours, scales, legends
    pictures  a group -> PNGs, with a text for who cannot see them
    tables    a group -> HTML tables
    document  a page that needs nothing else, of parts that are HTML
    page      all of it -> one HTML file that needs nothing else

Invariant: only runs with the same stream, base, training, length and split share a picture or a table. Names and labels
come from data: nothing of them is taken for markup, and the page allows no script and no request.
"""

from hf_cl.report.page import write_report as write_report
