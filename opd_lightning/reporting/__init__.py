"""Reports: what a folder of finished runs says, as a table, figures and one self-contained HTML file."""
