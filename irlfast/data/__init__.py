"""From files to token ids: sources → rows → what the chat template writes → examples. No model here.

``sources`` and ``formats`` read rows, ``conventions`` and ``demonstrations`` make conversations of them. ``templates``
and ``spelling`` write conversations and tokenise them, ``encoding`` cuts and counts, ``sets`` and ``store`` keep the
two sets of a run.
"""
