"""From files to token ids: sources → rows → conversations → the chat template's text → examples. No model here.

``sources`` and ``file_formats`` read rows. ``conventions`` and ``demonstrations`` turn rows into conversations.
``templates`` and ``special_tokens`` write conversations as text. ``encoding`` tokenises, cuts and counts. ``sets`` and
``store`` keep the training set and the held-out set of a run; ``packing`` makes batches.
"""
