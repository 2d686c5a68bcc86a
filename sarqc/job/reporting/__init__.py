"""What a run leaves behind: `report` keeps it, `facts` reads it, `page` and `card` tell it to people.

`shape` says what a report.json must look like before it is believed, `svg` draws the charts of the page.
"""
