"""What people look at: stages as text, graphs as pictures, one HTML page.

in    a spec, or the folder of a finished run
out   `stages.stage`: text.  `page.report`: a page.  `graph_picture.mermaid`, `graph_picture.svg`: a graph
open  page.py first
"""
