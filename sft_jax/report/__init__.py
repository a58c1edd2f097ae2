"""What people look at: tables, plots, and one page with everything."""
