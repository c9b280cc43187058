"""The settings of every job, and how they are read, checked and written."""
