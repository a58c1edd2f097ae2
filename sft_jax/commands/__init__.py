"""The commands, a file each: arguments in, one call, text out. They import what they need when they run."""
