"""Reports: the finished runs of a folder as a table, figures and one self-contained HTML file."""
