"""What people see of runs: pages, Markdown, LaTeX, tables and pictures in the terminal.

No torch here: a report can be made on a machine that could not run the model.
"""
