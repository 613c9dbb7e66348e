"""The results of a run, for people: the page with its plots, the closing table, the model card."""
