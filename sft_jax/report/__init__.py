"""Reports of data and runs as text, plots and HTML pages."""
