"""Error analysis: where a system fails and what mending it is worth, from tables of cases and scores alone."""
