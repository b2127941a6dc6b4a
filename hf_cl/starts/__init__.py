"""Where a new task's scores begin."""
