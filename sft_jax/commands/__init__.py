"""What the commands do, one file each: Python functions that the command line and the Python face call."""
