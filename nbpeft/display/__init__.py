"""Results and states as HTML and as text: one card, one table, one bar, one chart, one palette.

    blocks       what is shown, as plain data
    shown        the base class of results, which describe themselves with blocks
    numbers      sizes, counts and times for a person
    models, memory, training     states in words and as blocks
    differences  in which words two texts differ
    html, charts, palette        blocks for a notebook
    text         blocks for a terminal

Layers without a front end describe what they give with ``blocks`` and leave the drawing to ``html``. Importing
this imports neither torch nor a front end.
"""
