"""What a run leaves on disk and on screen: records, summary, tables, moving pictures.

No torch here: a report can be made on a machine that could not run the model.
"""
