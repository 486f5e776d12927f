"""The quality report: settings and peers over the same prompts and seeds, measured against the uncached pictures.

Order of reading: `pairs` (what is drawn), `rows` (what is compared), `bench` (one row drawn and timed), `peers`,
`meter` (block work), `metrics`, `jobs` (all rows, over processes, resumable), `report`, `chart`, `sheet`.
"""
