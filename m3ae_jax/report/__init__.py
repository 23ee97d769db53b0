"""Pictures, curves and the HTML page of a run."""
