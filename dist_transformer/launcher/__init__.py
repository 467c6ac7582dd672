"""Jobs on a cluster: checked, rendered, submitted, watched and stopped. Imports no torch: it runs on login nodes."""
