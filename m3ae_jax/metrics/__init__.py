"""Where figures and events of a run are written."""
