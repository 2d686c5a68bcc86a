"""What a run leaves behind: `report` keeps it, `summary` reads it, `page` and `model_card` show it.

`schema` says what a report.json must look like before it is believed, `svg` draws the charts of the page.
"""
