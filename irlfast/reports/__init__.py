"""What a run leaves for people: page, plots, tables, model card."""
