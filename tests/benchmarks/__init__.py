"""nbpeft and peft side by side: ``python -m tests.benchmarks``.

harness.py     a row of the table, and how it is measured: in turn, the median of several
table.py       the rows as text, Markdown or JSON
models.py      the models that rows measure on
rows_*.py      one group of rows each; a new file is found by its name
"""
