"""Nearest neighbours of views: exact search and the table it is kept in."""
