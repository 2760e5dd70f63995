"""Reports on an output: its end, its card, status, verification, estimate and `report.html`.

Only `finish` and `page` write files. Knows no replica.
"""
