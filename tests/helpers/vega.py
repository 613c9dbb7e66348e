"""Make Vega's JavaScript once, in the process that runs are forked from: every report needs it."""

from irlfast.reports.charts import vega

vega()
