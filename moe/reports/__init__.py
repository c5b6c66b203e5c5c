"""A sweep's results as a page and a table: what was found, and how far it can be trusted."""
