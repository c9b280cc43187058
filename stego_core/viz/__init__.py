"""Label maps made visible: colours over photographs and the HTML report of a run."""
