"""Cost accounting, routing statistics and depth maps."""
