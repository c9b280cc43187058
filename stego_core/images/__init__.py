"""From the bytes of an image file to pixels, and the geometry of crops, views and token grids."""
