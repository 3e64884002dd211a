"""Shows results and states as HTML and as text, with one set of cards, tables, bars, charts and colours.

    blocks       the content to show, as plain data
    shown        the base class of results, which describe themselves with blocks
    numbers      sizes, counts and times as text
    models, memory, training     states as text and as blocks
    differences  the words in which two texts differ
    html, charts, palette        blocks as HTML for a notebook
    text         blocks as text for a terminal

Layers without a front end describe their results with ``blocks`` and leave the rendering to ``html``. Importing this
package imports neither torch nor a front end.
"""
