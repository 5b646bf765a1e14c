"""What is kept: the database, the sessions' folders, and what makes them agree."""
